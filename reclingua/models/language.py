"""Load a language model, give it LoRA weights, teach it the words of item indices."""

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from reclingua.utils.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel

WORTH_A_PASS = 64  # tokens to be saved by a forward pass of its own


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder (or of hub name) `path`, with a pad token; InputError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the library raises a dozen kinds for "not there" and "not a model"
        raise InputError(f"{path}: no tokenizer could be loaded from there ({_first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no end token (eos_token); set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, never by id
    return tokenizer


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The decoder-only model in folder (or of hub name) `path`; InputError if there is none.

    Args:
        load_in_4bit: weights of linear layers as nf4 (QLoRA, arXiv 2305.14314), computed with in `dtype`.
        load_in_8bit: weights of linear layers as int8 (arXiv 2208.07339).
        device: where weights in 4 or 8 bits go (default: this process's GPU, if any); others stay on the CPU.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise InputError(f"{path}: is an adapter, not a model to start from; name the base model it was tuned on")
    how = {}
    if load_in_4bit or load_in_8bit:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        own = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
        how["device_map"] = {"": own if device is None else device}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **how)
    except Exception as error:
        raise InputError(
            f"{path}: no causal language model could be loaded from there ({_first_line(error)})"
        ) from None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that kernel lets no gradient through, and says nothing of it
    return model


def attention_window(model: PreTrainedModel) -> float:
    """How far back every layer sees, in tokens; 0 where a layer keeps more than the keys and values of tokens."""
    layers = DynamicCache(config=model.config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    return min((layer.get_max_length() for layer in layers if layer.is_sliding), default=float("inf"))


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward knows the argument."""
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter's forward takes all
    return argument in inspect.signature(wrapped.forward).parameters


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


def with_lora(
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
    """The base `model` with the adapter that `with_lora` left in `folder`; InputError if none can be loaded."""
    from peft import PeftModel

    make_room(model, tokenizer)
    try:
        return PeftModel.from_pretrained(model, folder)
    except Exception as error:
        raise InputError(
            f"{folder}: no adapter for {model.name_or_path} could be loaded from there ({_first_line(error)})"
        ) from None


def fingerprint(model: PreTrainedModel) -> str:
    """Of a base model: its weights' names and shapes, and some of its words."""
    digest = sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
    digest.update(model.get_input_embeddings().weight[:256].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a row for every token; new rows are random."""
    rows = max(tokenizer.get_vocab().values()) + 1  # more than len(tokenizer) where ids have gaps
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether samples that stand one after another in a row, told apart by `position_ids` alone, ignore each other."""
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=model.device)[None]
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=model.device)
    apart = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, 3:].float()
    joined = model(input_ids=ids, use_cache=False).logits[:, 3:].float()
    alone = model(input_ids=ids[:, 3:], use_cache=False).logits.float()
    model.train(was_training)
    return bool((apart - alone).abs().max() < 1e-2 * (joined - alone).abs().max())


def code_tokens(index: Mapping[str, list[str]]) -> list[str]:
    """Every code token of the index once, level by level, codes in numeric order."""
    level_of = {code: level for codes in index.values() for level, code in enumerate(codes)}

    def order(code: str) -> tuple[int, int, str]:
        digits = "".join(filter(str.isdecimal, code))
        return level_of[code], int(digits or 0), code

    return sorted(level_of, key=order)


def index_token_ids(tokenizer: PreTrainedTokenizerBase, index: Mapping[str, list[str]]) -> dict[str, list[int]]:
    """Item -> its index as token ids; InputError if a code is not one token of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    unknown = next((code for codes in index.values() for code in codes if code not in vocabulary), None)
    if unknown is not None:
        raise InputError(
            f"index token {unknown!r} is not a word of this model: it was tuned on another index; "
            "give the index file it was tuned with as --index_file"
        )
    return {item: [vocabulary[code] for code in codes] for item, codes in index.items()}


@torch.no_grad()
def extend_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: Mapping[str, list[str]],
    texts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> int:
    """Make every code token a word of its own, one token id each, and give its new rows a meaning.

    A code begins as the mean, over the items that carry it, of the mean embedding of the words of their text; these
    means are centred and brought to the spread of the model's own rows, since the mean of many words is nearly the
    same for all codes. An output head that is not tied to the input embeddings gets its rows in the same way.

    Args:
        texts: item -> its text; without it the new rows are drawn at random with the mean and spread of the others.

    Returns:
        How many tokens were added; 0 for a model that has them all already, as a tuned checkpoint does.

    Raises:
        InputError: a code is a word of the base model's own vocabulary.
    """
    codes = code_tokens(index)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    if all(code in added and code not in special for code in codes):
        return 0
    if (taken := next((code for code in codes if code in vocabulary), None)) is not None:
        item = next(item for item, tokens in index.items() if taken in tokens)
        raise InputError(
            f"index token {taken!r} of item {item!r} is already a word of the base model's vocabulary; "
            "rename the codes, for example to <a_1>"
        )
    tokenizer.add_tokens([AddedToken(code, normalized=False, special=False) for code in codes])
    make_room(model, tokenizer)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(codes))
    old = torch.tensor(sorted(set(vocabulary.values()) - set(ids.tolist())))
    words = _words_of_codes(tokenizer, index, texts, codes) if texts else None
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in [embedding] if head is embedding else [embedding, head]:
        known = weight[old.to(weight.device)].float().cpu()
        mean, spread = known.mean(0), known.std(0).mean()
        rows = torch.randn(len(codes), known.shape[1], generator=generator)
        if words is not None:
            meanings = torch.stack([weight[word.to(weight.device)].float().cpu().mean(0) for word in words])
            meanings = meanings - meanings.mean(0)
            # Half noise: codes whose items share most of their words must still be told apart.
            rows = 0.5**0.5 * (rows + meanings / meanings.std().clamp(min=1e-9))
        weight[ids.to(weight.device)] = (mean + spread * rows).to(weight)
    return len(codes)


def _words_of_codes(
    tokenizer: PreTrainedTokenizerBase, index: Mapping[str, list[str]], texts: Mapping[str, str], codes: list[str]
) -> list[torch.Tensor]:
    """For each code the token ids of the texts of all items that carry it."""
    items = list(index)
    encoded = tokenizer([texts[item] for item in items], add_special_tokens=False, truncation=True, max_length=64)
    words: dict[str, list[int]] = {code: [] for code in codes}
    for item, ids in zip(items, encoded.input_ids, strict=True):
        for code in index[item]:
            words[code].extend(ids or [tokenizer.eos_token_id])
    return [torch.tensor(words[code]) for code in codes]
