"""The methods by name. Each module offers the steps of a training, which finetune.py calls in this order:

check_flags(arguments)                        InputError for flags that contradict each other or the method
build_data(arguments, log)                    samples, prompts, checkpoint metadata
build_model(arguments, data, log)             the TrainingSetup: model, tokenizer, tokenized samples
build_evaluation(arguments, data, setup)      a function that computes the metrics on valid
finish_model(arguments, model)                called before the tuned model is saved
"""

from types import ModuleType

from reclingua.methods import lcrec, yes_no
from reclingua.models.registry import YES_NO_METHODS

METHODS: dict[str, ModuleType] = {"lcrec": lcrec} | dict.fromkeys(YES_NO_METHODS, yes_no)
