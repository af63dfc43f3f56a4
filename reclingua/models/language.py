"""Language models and tokenizers: loading, limits of their context, and fingerprints of their weights."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from reclingua.utils.errors import InputError, print_note
from reclingua.utils.hub import hub_options
from reclingua.utils.provenance import file_sha256

DTYPES = ("float32", "bfloat16", "float16")
MIN_SHARED_PREFIX = 64  # tokens that an extra forward pass over a shared prefix has to save


def absolute_name(model: str | Path) -> str:
    """Return the absolute path of a model folder, or the hub name as it is, for a checkpoint to store."""
    return str(Path(model).absolute()) if Path(model).is_dir() else str(model)


def check_base_model(path: str | Path, stored: str | None, folder: str | Path) -> None:
    """Raise InputError if the base model at `path` is not the one that `folder` was tuned on, by its fingerprint.

    A checkpoint of an earlier version has no fingerprint (None) of this kind; a line states that nothing is checked.
    """
    if stored is None:
        print_note(f"{folder} has no fingerprint of its base model: {path} cannot be checked")
    elif base_fingerprint(path) != stored:
        raise InputError(
            f"{path}: is not the base model that {folder} was tuned on, its weights are others; see --base_model"
        )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in folder (or of hub name) `path`, with a pad token; InputError if there is none."""
    options = hub_options(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # the library raises a dozen classes for a missing or invalid folder
        raise loading_error(path, "tokenizer", error) from None
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
    """Load the decoder-only model in folder (or of hub name) `path`; InputError if there is none.

    Args:
        load_in_4bit: linear layers have nf4 weights (QLoRA, arXiv 2305.14314) and compute in `dtype`.
        load_in_8bit: linear layers have int8 weights (arXiv 2208.07339).
        device: of weights in 4 or 8 bits (default: the current GPU, if any); others stay on the CPU.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise InputError(
            f"{path}: is an adapter, not a model to start from; name the base model it was tuned on, or merge it into "
            "that one by python -m convert.merge_lora"
        )
    options = hub_options(path)
    if load_in_4bit or load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        default = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        options["device_map"] = {"": default if device is None else device}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except Exception as error:
        raise loading_error(path, "causal language model", error) from None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # That kernel of bitsandbytes silently drops gradients.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # nn.Module allows any attribute
    return model


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model reads; None where its config states no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def attention_window(model: PreTrainedModel) -> float:
    """Return how many tokens back every layer sees; 0 where a layer caches more than keys and values of tokens."""
    layers: list[Any] = DynamicCache(config=model.config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    return min((layer.get_max_length() for layer in layers if layer.is_sliding), default=float("inf"))


def base_fingerprint(path: str | Path) -> str:
    """Return the fingerprint of the weights of the model in folder (or of hub name) `path`.

    It covers the name, the shape and a few values of every tensor, which files the weights are in does not matter.
    Pickles are not opened: their bytes are hashed. InputError if there are no weights.
    """
    entries = []
    for file in weight_files(path):
        if file.suffix != ".safetensors":
            entries.append(f"{file.name} {file_sha256(file)}".encode())
            continue
        with safe_open(file, framework="pt") as tensors:
            entries += [name.encode() + _sample_tensor(tensors, name) for name in tensors.keys()]
    return sha256(b"".join(sorted(entries))).hexdigest()


def weight_files(path: str | Path) -> list[Path]:
    """Return the weight files that transformers loads of a model, downloaded if it is a hub name."""
    is_local = "local_files_only" in hub_options(path)
    try:
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            file = cached_file(path, name, local_files_only=is_local, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                is_index = name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
                return (
                    [Path(shard) for shard in get_checkpoint_shard_files(path, file)[0]] if is_index else [Path(file)]
                )
    except Exception as error:
        raise InputError(f"{path}: its weights cannot be found ({summarize_error(error)})") from None
    raise InputError(f"{path}: holds no weights of a language model; name a folder or hub name of one")


def _sample_tensor(tensors: Any, name: str) -> bytes:
    """Return the shape of a tensor, and 64 values of its first, middle and last row."""
    part = tensors.get_slice(name)
    shape = part.get_shape()
    if not shape or 0 in shape:
        return f"{shape}".encode() + (b"" if shape else tensors.get_tensor(name).float().numpy().tobytes())
    rows = [part[row : row + 1].flatten()[:64].float() for row in (0, shape[0] // 2, shape[0] - 1)]
    return f"{shape}".encode() + torch.cat(rows).numpy().tobytes()


def loading_error(path: str | Path, kind: str, error: Exception) -> InputError:
    """Return the InputError for what transformers raised when it loaded a tokenizer or a model (`kind`)."""
    if "trust_remote_code" in str(error):
        return InputError(
            f"{path}: comes with Python code of its own, which is not run; read it, and add --trust_remote_code if "
            "you trust it"
        )
    return InputError(f"{path}: no {kind} could be loaded ({summarize_error(error)})")


def summarize_error(error: Exception) -> str:
    """Return the class of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
