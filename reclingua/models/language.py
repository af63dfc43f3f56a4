"""Load a language model, give it LoRA weights, teach it the words of item indices."""

import inspect
import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reclingua.utils.errors import InputError

if TYPE_CHECKING:
    pass

MIN_SHARED_PREFIX = 64  # tokens to be saved by a forward pass of its own


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder (or of hub name) `path`, with a pad token; InputError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the library raises a dozen kinds for "not there" and "not a model"
        raise InputError(f"{path}: no tokenizer could be loaded from there ({first_line(error)})") from None
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
            f"{path}: no causal language model could be loaded from there ({first_line(error)})"
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


def accepts_argument(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward knows the argument."""
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter's forward takes all
    return argument in inspect.signature(wrapped.forward).parameters


def base_fingerprint(model: PreTrainedModel) -> str:
    """Of a base model: its weights' names and shapes, and some of its words."""
    digest = sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
    digest.update(model.get_input_embeddings().weight[:256].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@torch.no_grad()
def supports_packing(model: PreTrainedModel) -> bool:
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


DTYPES = ("float32", "bfloat16", "float16")
