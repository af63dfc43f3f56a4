"""LoRA weights of a language model: injected into it, or as a PEFT adapter with rows for new tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from reclingua.models.language import summarize_error
from reclingua.models.vocabulary import resize_embeddings
from reclingua.utils.errors import InputError


def linear_layers(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Return name -> linear layer whose last name part is in `targets`; a LoRA layer counts as the layer in it.

    Raises:
        InputError: no layer has the name of a target; the message lists all names.
    """
    head = model.get_output_embeddings()  # is never a target
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if module is not head
        and isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D)
        and not {"base_layer", "lora_A", "lora_B", "default"} & set(name.split("."))
    }
    names = {name.rpartition(".")[2] for name in layers}
    if missing := [target for target in targets if target not in names]:
        raise InputError(
            f"--lora_target_modules {','.join(targets)}: this model has no layer {missing[0]!r}; "
            f"it has {', '.join(sorted(names))}"
        )
    return {name: module for name, module in layers.items() if name.rpartition(".")[2] in targets}


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    """Inject float32 LoRA weights, initially without effect, into the linear layers named by `targets`."""
    from peft import (  # imported here: it takes seconds that other methods need not spend
        LoraConfig,
        inject_adapter_in_model,
    )

    linear_layers(model, targets)
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, used as a factor
            lora_dropout=dropout,
            target_modules=list(targets),
        ),
        model,
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()


def add_lora_adapter(
    model: PreTrainedModel, tokens: list[int], rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> PreTrainedModel:
    """Return `model` with LoRA weights and trainable rows for new tokens, all float32; the rest is frozen.

    Its `save_pretrained` writes a PEFT adapter with these weights only; embeddings that were tied stay tied.

    Args:
        tokens: ids whose rows of input embeddings and output head are trained.
        targets: names of linear layers, or ["all-linear"].
    """
    from peft import LoraConfig, get_peft_model

    all_linear = list(targets) == ["all-linear"]
    if not all_linear:
        linear_layers(model, targets)
    names = {module: name for name, module in model.named_modules()}
    rows = {names[module]: tokens for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, used as a factor
        lora_dropout=dropout,
        target_modules="all-linear" if all_linear else list(targets),
        trainable_token_indices=rows,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in names),
    )
    return _prepare_training(get_peft_model(model, config))


def _prepare_training(adapted: Any) -> PreTrainedModel:
    """Make the trained weights of a PEFT model float32, and have it save these alone."""
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    # By default PEFT writes all embeddings, too, because their number is not the base model's.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted  # it forwards what it does not define itself


def load_lora(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, is_trainable: bool = False
) -> PreTrainedModel:
    """Load the adapter in `folder`, saved from `add_lora_adapter`, into the base `model`; InputError if it fails.

    Args:
        is_trainable: the adapter is trained further, as after `add_lora_adapter`.
    """
    from peft import PeftModel

    resize_embeddings(model, tokenizer)
    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
        return _prepare_training(adapted) if is_trainable else cast(PreTrainedModel, adapted)
    except Exception as error:
        raise InputError(
            f"{folder}: no adapter for {model.name_or_path} could be loaded ({summarize_error(error)})"
        ) from None
