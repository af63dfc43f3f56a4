"""LoRA weights in a language model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from reclingua.models.language import first_line
from reclingua.models.vocabulary import resize_embeddings
from reclingua.utils.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel


def linear_layers(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Linear layers (those inside a LoRA layer count as that layer) whose names end with one of `targets`, by name.

    Raises:
        InputError: a target that no layer has, with the names there are.
    """
    head = model.get_output_embeddings()  # whose logits but one nobody computes
    found = {
        name: module
        for name, module in model.named_modules()
        if module is not head
        and isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D)
        and not {"base_layer", "lora_A", "lora_B", "default"} & set(name.split("."))
    }
    names = {name.rpartition(".")[2] for name in found}
    if missing := [target for target in targets if target not in names]:
        raise InputError(
            f"--lora_target_modules {','.join(targets)}: this model has no layer {missing[0]!r}; "
            f"it has {', '.join(sorted(names))}"
        )
    return {name: module for name, module in found.items() if name.rpartition(".")[2] in targets}


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    """Put LoRA weights, float32, beside the linear layers whose names end with one of `targets`; they begin at 0."""
    from peft import LoraConfig, inject_adapter_in_model  # seconds that other methods need not wait

    linear_layers(model, targets)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)), model
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()


def add_lora_adapter(
    model: PreTrainedModel, tokens: list[int], rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> "PeftModel":
    """`model` with LoRA weights and rows of its own for the new tokens, all float32; the rest is frozen.

    Its `save_pretrained` writes a PEFT adapter of these alone: the embeddings stay as they are, tied if they were.

    Args:
        tokens: ids whose rows are trained, those of the input embeddings and of the output head.
        targets: names of linear layers, or just "all-linear".
    """
    from peft import LoraConfig, get_peft_model

    every = list(targets) == ["all-linear"]
    if not every:
        linear_layers(model, targets)
    names = {module: name for name, module in model.named_modules()}
    rows = {names[module]: tokens for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if every else list(targets),
        trainable_token_indices=rows,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in names),
    )
    adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    # By default it would write all embeddings, too, because their number is not the base model's.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def load_lora(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> "PeftModel":
    """The base `model` with the adapter that `add_lora_adapter` left in `folder`; InputError if none can be loaded."""
    from peft import PeftModel

    resize_embeddings(model, tokenizer)
    try:
        return PeftModel.from_pretrained(model, folder)
    except Exception as error:
        raise InputError(
            f"{folder}: no adapter for {model.name_or_path} could be loaded from there ({first_line(error)})"
        ) from None
