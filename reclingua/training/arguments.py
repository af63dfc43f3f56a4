"""Flags of finetune.py: a dataclass for each group, LC-Rec's names beside the Trainer's own, defaults from YAML."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_flytekit_available,
)
from transformers.utils import is_liger_kernel_available

from reclingua.datasets.samplers import ORDERS
from reclingua.datasets.tasks import TARGETS, TASKS
from reclingua.datasets.trees import HISTORY_WINDOWS
from reclingua.datasets.yes_no import CODE_FORMATS
from reclingua.models.language import DTYPES
from reclingua.training.compilation import check_compiler
from reclingua.training.zero import check_deepspeed, check_precision
from reclingua.utils.errors import InputError, one_line_errors
from reclingua.utils.files import read_yaml
from reclingua.utils.hub import TRUST_HELP

METHODS = ("lcrec", "tallrec", "collm", "binllm", "cora", "softprompt", "personprompt")
# Defaults that depend on the method: for lcrec, for the Yes/No methods.
BY_METHOD = {"metric_for_best_model": ("ndcg@10", "auc"), "max_eval_samples": (500, 0)}

# Flags of the Trainer that the batches and the loss of this project do not support.
UNSUPPORTED = {
    "label_smoothing_factor": "is not supported by the chunked loss",
    "auto_find_batch_size": "has no meaning here: give --max_tokens_per_batch",
    "dataloader_drop_last": "has no meaning here: every sample is trained on",
    "dataloader_persistent_workers": "would keep the prompts of the first epoch",
    "use_cache": "is for generation, and set by the beam search itself",
    "torch_compile_backend": "has no meaning here: --torch_compile takes inductor",
    "torch_compile_mode": "has no meaning here: --torch_compile has one mode",
    "ddp_static_graph": "does not work with the chunked loss",
    "fsdp": "is not supported; use --deepspeed",
    "save_only_model": "would leave nothing to resume from; --lora makes small checkpoints",
    "enable_jit_checkpoint": "has no meaning here: SIGTERM always saves",
}


# Packages of the loggers of --report_to that have another name.
LOGGER_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}

# A preset, which can be a stranger's, never states where anything goes or whose code is run.
COMMAND_LINE_ONLY = (
    *("output_dir", "logging_dir", "resume_from_checkpoint"),
    *("report_to", "run_name", "project", "trust_remote_code"),
)
COMMAND_LINE_ONLY_PREFIXES = ("push_to_hub", "hub_", "trackio_")


def argument(default: Any, help: str, aliases: list[str] | None = None) -> Any:
    """Declare a flag; the annotation of its field is its type, as with `dataclasses.field`."""
    return HfArg(default=default, help=help, aliases=aliases)


@dataclass
class ModelArguments:
    """Which language model is tuned."""

    _argument_group_name = "model"

    base_model: str = argument(
        default=None, help="folder or hub name of a decoder-only model (required, unless --init_from knows it)"
    )
    base_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of frozen weights; trained ones are float32; if omitted, that of --init_from, else "
            "bfloat16 on a GPU with --bf16 or --load_in_4bit, else float32",
            "choices": DTYPES,
        },
    )
    load_in_4bit: bool | None = field(
        default=None,
        metadata={
            "help": "frozen weights of linear layers as nf4; if omitted, as in --init_from",
            "nargs": "?",
            "const": True,
        },
    )
    load_in_8bit: bool = argument(
        default=False, help="frozen weights of linear layers as int8; with --method lcrec --lora only"
    )
    init_from: str | None = argument(
        default=None,
        help="folder of a checkpoint of the same method, whose training is continued; of a Yes/No method also the "
        "first stage, from --method tallrec",
    )
    trust_remote_code: bool = argument(default=False, help=TRUST_HELP)


@dataclass
class DataArguments:
    """Which data the model is tuned on, and how they are written into prompts."""

    _argument_group_name = "data"

    dataset: str = argument(default="ml-100k", help="name of the dataset")
    data_path: str = argument(default="data", help="folder that holds <dataset>/")
    index_file: str = argument(default=".index.json", help="semantic IDs: file suffix, or a path if it has a slash")
    user_file: str = argument(default=".user.json", help="user texts (preferences, intentions): file suffix or path")
    prompt_file: str | None = argument(
        default=None, help="prompt templates; if omitted, config/prompts/lcrec.yaml or yes_no.yaml"
    )
    max_his_len: int = argument(default=20, help="items of a history that the model reads; -1 with lcrec: all")
    max_text_len: int = argument(default=64, help="longest title, description or user text, in words")
    his_sep: str = argument(default=", ", help="separator between history items")
    add_prefix: bool = argument(default=False, help="number the items of a history")
    max_eval_samples: int | None = argument(
        default=None,
        help="users searched for, or rows drawn (8 of a user at most), at each evaluation; 0 = all; "
        "if omitted, 500 with lcrec, else all",
    )


@dataclass
class MethodArguments:
    """How the model is tuned: the flags of LC-Rec."""

    _argument_group_name = "method"

    method: str = field(default="lcrec", metadata={"help": "tuning method", "choices": METHODS})
    tasks: str = argument(default="seqrec", help=f"training tasks, separated by commas, of: {', '.join(TASKS)}")
    train_prompt_sample_num: str = argument(
        default="1", help="prompts per sample and epoch: a number for each task, or one for all"
    )
    train_data_sample_num: str = argument(
        default="0", help="training samples: a number for each task, or one for all; 0 = all"
    )
    targets: str = field(
        default="last",
        metadata={
            "help": "last: a sample for each prefix of a history, its last item is the target (LC-Rec); all: a sample "
            "for each history, all items after the first are targets",
            "choices": TARGETS,
        },
    )
    only_train_response: bool = argument(default=True, help="loss on the response only; False: on the prompt as well")
    packing: bool = argument(default=False, help="pack several samples into a row instead of padding")
    embedding_dropout: float = argument(default=0.0, help="dropout on the input embeddings while training")
    exclude_seen: bool = argument(default=False, help="leave the user's own items out of the candidates at evaluation")


@dataclass
class LoraArguments:
    """Low-rank adaptation (LoRA)."""

    _argument_group_name = "LoRA (with cora: its generated weights)"

    lora: bool | None = field(
        default=None,
        metadata={
            "help": "train LoRA weights; if omitted, with tallrec and binllm, and with --one_stage; "
            "--lora False with these two: train all weights of the language model",
            "nargs": "?",
            "const": True,
        },
    )
    lora_r: int = argument(default=8, help="rank")
    lora_alpha: float | None = argument(
        default=None, help="the scale is alpha / r; if omitted, 16, with lcrec 32 as in LC-Rec"
    )
    lora_dropout: float = argument(default=0.05, help="dropout on the input of the LoRA weights")
    lora_target_modules: str | None = argument(
        default=None, help="names of linear layers; if omitted, q_proj,v_proj, with lcrec all"
    )

    def low_rank(self, alpha: float, targets: str) -> dict:
        """Return rank, alpha, dropout and targets; `alpha` and `targets` are the defaults."""
        alpha = alpha if self.lora_alpha is None else self.lora_alpha
        if self.lora_r < 1 or alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise InputError("--lora_r should be 1 at least, --lora_alpha above 0, --lora_dropout from 0 to below 1")
        layers = (self.lora_target_modules or targets).split(",")
        return {"rank": self.lora_r, "alpha": alpha, "dropout": self.lora_dropout, "targets": layers}


@dataclass
class YesNoArguments:
    """How the model is tuned: the flags of the Yes/No methods."""

    _argument_group_name = "method: tallrec, collm, binllm, cora, softprompt, personprompt"

    cf_model: str | None = argument(default=None, help="folder of a collaborative model, from pretrain.py")
    train_cf_model: bool = argument(default=False, help="train the collaborative model further (T1)")
    cf_model_from_scratch: bool = argument(default=False, help="train the collaborative model from new weights (T2)")
    one_stage: bool = argument(default=False, help="train new LoRA weights together with the method's own parts (T3)")
    history_window: str = field(
        default="anchored",
        metadata={
            "help": "liked titles of a prompt, n = --max_his_len: anchored, the last n to 2 n - 1, so that prompts of "
            "one user begin alike; sliding, the last n, as in the papers",
            "choices": HISTORY_WINDOWS,
        },
    )
    rows_per_tree: int = argument(
        default=16, help="most ratings of a user that are trained and scored in one pass over their common history"
    )
    soft_tokens: int = argument(default=1, help="soft tokens for each user and item")
    code_format: str = field(
        default="bits", metadata={"help": "binllm's codes: 0110... or 172.16.254.3", "choices": CODE_FORMATS}
    )
    patience: int = argument(default=0, help="stop after so many evaluations without improvement; 0 = never")
    save_base_weights: bool = argument(default=False, help="save the base model's weights as well as the trained ones")


@dataclass
class TuningArguments(TrainingArguments):
    """Every flag of `transformers.TrainingArguments`, with LC-Rec's names and defaults where it has some."""

    _argument_group_name = "training"

    output_dir: str | None = argument(default=None, help="folder for checkpoints and the tuned model (required)")
    per_device_train_batch_size: int = argument(
        default=8, aliases=["--per_device_batch_size"], help="samples per device and step"
    )
    max_tokens_per_batch: int = argument(
        default=0, help="tokens per device and step, padding included, instead of a number of samples; 0 = by samples"
    )
    train_sampling_strategy: str = argument(
        default="group_by_length",
        help="batches of samples of one length: group_by_length (with --packing as random); random; sequential",
    )
    max_logits_mb: int = argument(default=512, help="logits memory per loss chunk, MB")
    num_train_epochs: float = argument(default=4, aliases=["--epochs"], help="passes over the training samples")
    learning_rate: float = argument(default=5e-5, help="peak learning rate of AdamW")
    weight_decay: float = argument(default=0.01, help="weight decay of AdamW")
    lr_scheduler_type: str = argument(default="cosine", help="shape of the learning rate's decay")
    warmup_steps: float = argument(default=0.01, help="steps of linear warm-up; below 1: share of all steps")
    eval_strategy: str = argument(default="epoch", help="when to evaluate: no, steps, epoch")
    save_strategy: str = argument(default="epoch", help="when to save a checkpoint: no, steps, epoch")
    save_and_eval_strategy: str | None = argument(default=None, help="sets both of these")
    save_total_limit: int | None = argument(default=1, help="checkpoints kept beside the best")
    load_best_model_at_end: bool = argument(default=True, help="end with the checkpoint of the best valid metric")
    metric_for_best_model: str | None = argument(
        default=None,
        help="valid metric that selects the checkpoint: hit@10, ndcg@10 or loss with lcrec, auc or uauc with the "
        "others; if omitted, ndcg@10 or auc",
    )
    logging_steps: float = argument(default=50, help="steps between two lines of the training log")
    report_to: str | None = argument(default="none", help="experiment loggers: tensorboard, wandb, ...")
    dataloader_pin_memory: bool = argument(
        default=torch.cuda.is_available(), help="pin batches in memory; helps with a GPU"
    )
    dataloader_num_workers: int = argument(
        default=4 if torch.cuda.is_available() else 0, help="processes that prepare samples while a GPU computes"
    )
    torch_compile: bool = argument(
        default=False, help="compile the decoder layers by torch.compile, which takes a minute; needs a C++ compiler"
    )
    logging_nan_inf_filter: bool = argument(default=False, help="leave a loss of NaN or infinity out of the log")
    remove_unused_columns: bool = argument(default=False, help="left to the collator")
    resume_from_checkpoint: str | None = argument(
        default=None, help="checkpoint to resume from; auto: the newest complete one in output_dir, if any"
    )

    def __post_init__(self):
        if self.save_and_eval_strategy:
            self.eval_strategy = self.save_strategy = self.save_and_eval_strategy
        if self.eval_strategy == "no" or self.save_strategy == "no":
            self.load_best_model_at_end = False  # there will be no best to load
        if self.eval_steps is None:
            self.eval_steps = self.save_steps
        if self.train_sampling_strategy not in ORDERS:
            raise ValueError(f"--train_sampling_strategy should be one of {', '.join(ORDERS)}")
        for flag, instead in UNSUPPORTED.items():
            if getattr(self, flag):
                raise ValueError(f"--{flag} {instead}")
        if self.max_tokens_per_batch < 0 or self.max_logits_mb < 1 or self.per_device_train_batch_size < 1:
            raise ValueError(
                "--max_tokens_per_batch should be 0 at least, --max_logits_mb and --per_device_batch_size 1"
            )
        if self.use_liger_kernel:
            if not torch.cuda.is_available():
                raise ValueError("--use_liger_kernel needs a GPU")
            if not is_liger_kernel_available():
                raise ValueError("--use_liger_kernel needs `pip install liger-kernel`")
            # Liger's own losses would compute the head at every position.
            own_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
            self.liger_kernel_config = (self.liger_kernel_config or {}) | own_loss
        self._check_loggers()
        if self.deepspeed:
            content = check_deepspeed(self.deepspeed, on_cpu=self.use_cpu or not torch.cuda.is_available())
            check_precision(content, "bf16" if self.bf16 else "fp16" if self.fp16 else "")
        if compiles_layers := self.torch_compile:
            check_compiler()
            if self.deepspeed:
                raise ValueError("--torch_compile is not for --deepspeed, whose hooks run between the layers")
        self.torch_compile = False  # accelerate would compile the whole model; RecTrainer compiles its layers
        super().__post_init__()
        self.torch_compile = compiles_layers
        if self.deepspeed and self.hf_deepspeed_config.mismatches:
            wrong = "; ".join(each.removeprefix("- ds ") for each in self.hf_deepspeed_config.mismatches)
            raise ValueError(f"the file of --deepspeed says otherwise: {wrong}; give the flag, or auto in the file")
        if self.deepspeed and self.save_on_each_node:
            raise ValueError("--save_on_each_node: DeepSpeed's checkpoints go to a folder that all machines see")
        if self.push_to_hub and "checkpoint" in self.hub_strategy.value:
            raise ValueError("--hub_strategy: checkpoints cannot be pushed while they are written; take end")
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: start with torchrun --nproc_per_node {self.n_gpu}, "
                "or show it one by CUDA_VISIBLE_DEVICES=0"
            )

    def _check_loggers(self) -> None:
        """Raise ValueError for a logger of --report_to that does not exist or whose package is not installed."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        installed = get_available_reporting_integrations() + ["flyte"] * is_flytekit_available()
        for name in sorted(set(names) - {"none", "all"}):
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                raise ValueError(f"--report_to {name}: should be none, all or one of {known}")
            if name not in installed:
                package = LOGGER_PACKAGES.get(name, name)
                raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {package}")


class Arguments(NamedTuple):
    """All flags of finetune.py, by group."""

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    lora: LoraArguments
    yes_no: YesNoArguments
    training: TuningArguments


def parse_arguments(description: str) -> Arguments:
    """Return the flags of the command line."""
    groups = [ModelArguments, DataArguments, MethodArguments, LoraArguments, YesNoArguments, TuningArguments]
    return Arguments(*parse(groups, description))


def refuse_flags(method: str, group: Any, flags: Iterable[str]) -> None:
    """Raise InputError for one of these flags of a group that was given although the method does not use it."""
    if flag := first_given(group, flags):
        raise InputError(f"--{flag} has no effect with --method {method}; leave it out")


def first_given(group: Any, flags: Iterable[str]) -> str | None:
    """Return the first of these flags of a group whose value is not its default, or None."""
    defaults = {field.name: field.default for field in fields(group)}
    return next((flag for flag in flags if getattr(group, flag) != defaults[flag]), None)


def parse(dataclasses: list[Any], description: str, argv: list[str] | None = None) -> tuple:
    """Return each dataclass filled: from defaults, then `--config preset.yaml`, then the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclasses, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML preset: supplies defaults for the flags, the command line wins")
    declared = [f for dataclass_ in dataclasses for f in fields(dataclass_) if f.init]
    known = {f.name for f in declared} | {a.lstrip("-") for f in declared for a in f.metadata.get("aliases", [])}
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv):
            argv = preset_flags(argv[position + 1], known) + argv
        elif word.startswith("--config="):
            argv = preset_flags(word.partition("=")[2], known) + argv
    namespace = vars(one_line_errors(parser).parse_args(argv))
    for flag, (of_lcrec, of_yes_no) in BY_METHOD.items():
        if "method" in namespace and namespace[flag] is None:
            namespace[flag] = of_lcrec if namespace["method"] == "lcrec" else of_yes_no
    try:
        return tuple(cls(**{f.name: namespace[f.name] for f in fields(cls) if f.init}) for cls in dataclasses)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(f"these flags do not go together: {error}") from None


def preset_flags(path: str, known: set[str]) -> list[str]:
    """Return a YAML preset as flags; InputError names the key that is not a flag."""
    preset = read_yaml(path, "preset")
    if not isinstance(preset, dict):
        raise InputError(f"{path}: should hold 'flag: value' lines")
    flags = []
    for key, value in preset.items():
        if key not in known:
            raise InputError(f"{path}: {key!r} is not a flag of this script; see --help")
        if key in COMMAND_LINE_ONLY or key.startswith(COMMAND_LINE_ONLY_PREFIXES):
            raise InputError(f"{path}: {key!r} can be given on the command line only; take it out of the preset")
        if value is not None:
            value = "no" if value is False and key.endswith("strategy") else value  # YAML reads a bare no as false
            value = json.dumps(value) if isinstance(value, dict) else value
            if not isinstance(value, list):
                flags.append(f"--{key}={value}")
            elif flag := next((entry for entry in map(str, value) if entry.startswith("-")), None):
                raise InputError(f"{path}: {key!r} has the entry {flag!r}, which would be read as a flag")
            else:
                flags += [f"--{key}", *map(str, value)]
    return flags
