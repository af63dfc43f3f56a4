"""What a method hands to finetune.py or grpo.py: the model and the samples of a training."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase

from reclingua.training.arguments import TuningArguments
from reclingua.utils.metadata import CheckpointMetadata

Log = Callable[[str], None]


@dataclass(frozen=True)
class TrainingSetup:
    """A model and its tokenized samples, ready to be trained.

    Args:
        train, valid: samples as token ids, with `set_epoch` and `lengths`.
        lengths: int64 [samples], the most tokens of each training sample in any epoch.
        metadata: saved with every checkpoint.
        checkpoint: from which training resumes.
        max_logits_mb: for the chunked loss over labelled tokens; None: the model computes its own loss.
        packing: several samples share a row.
        flash: rows are packed for flash attention, which only training uses.
        find_unused_parameters: default of --ddp_find_unused_parameters; None: the Trainer's own.
    """

    model: Any  # the method's own PreTrainedModel, or a PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Any  # InstructionDataset or YesNoDataset
    valid: Any
    collator: Callable
    lengths: np.ndarray
    metadata: CheckpointMetadata
    checkpoint: Path | None
    max_logits_mb: int | None = None
    packing: bool = False
    flash: bool = False
    find_unused_parameters: bool | None = None

    def trainer_arguments(self, args: TuningArguments, patience: int) -> dict[str, Any]:
        """Return the arguments that every trainer takes; sets the defaults that depend on this training in `args`."""
        args.disable_tqdm = not sys.stderr.isatty()
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = self.find_unused_parameters
        return {
            "model": self.model,
            "args": args,
            "train_dataset": self.train,
            "eval_dataset": self.valid,
            "data_collator": self.collator,
            "processing_class": self.tokenizer,
            "metadata": self.metadata,
            "callbacks": [EarlyStoppingCallback(patience)] if patience else None,
        }
