"""What a method brings to a training: `prepare` of reclingua/methods/lcrec.py and reclingua/methods/yes_no.py makes it for finetune.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class TrainingSetup:
    """
    Args:
        train, valid: samples as tokens, with `set_epoch` and `lengths`.
        lengths: tokens of each training sample at most.
        measure: the metrics of the model on valid.
        max_logits_mb: for a loss of labelled tokens; None: the model has its own.
        checkpoint: to go on from.
        packing, flash: samples end to end; with flash attention, which is for training alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset
    collator: Callable
    lengths: np.ndarray
    measure: Callable[[], dict[str, float]]
    record: dict
    max_logits_mb: int | None
    checkpoint: Path | None
    packing: bool = False
    flash: bool = False
