"""Format of deltas: the differences of a fine-tuned model to its base model, and exact corrections.

A delta folder has the files of the fine-tuned model; adding its tensors to the base model restores that model up to
rounding, as with LC-Rec's deltas. In addition, `delta.json` names the base model, and `corrections*.safetensors`
contain the elements that addition does not restore bit by bit.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from convert.folders import is_tied
from convert.shards import CODES, StoredTensor, read_weights
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

DELTA, FORMAT = "delta.json", 1
CORRECTIONS = "corrections"  # prefix of file names
HEAD = "lm_head.weight"
SUBTRACTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER_DTYPES = {
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
}  # bytes of an element -> dtype, for bitwise comparison


@dataclass
class Entry:
    """Entry of `delta.json`: how a tensor is stored.

    Args:
        stored: "difference" or "whole".
        why: reason for storing it whole.
        corrected: number of elements of a difference in `corrections*.safetensors`; all of them if the file contains
            the whole tensor.
        base_xxh3: checksum of the tensor in the base model; None if the base model has none.
    """

    stored: str
    why: str | None = None
    corrected: int = 0
    base_xxh3: str | None = None


def read_model(folder: Path, tied: bool) -> dict[str, StoredTensor]:
    """Read the weights of a folder, except tensors that the model computes: a tied head, rotary frequencies."""
    weights = read_weights(folder)
    return {
        name: tensor
        for name, tensor in weights.items()
        if not (tied and name == HEAD) and not name.endswith("rotary_emb.inv_freq")
    }


def pair_tensors(
    base: Path, other: Path, base_name: str | None = None
) -> tuple[dict[str, Entry], dict[str, tuple[StoredTensor | None, StoredTensor]]]:
    """Pair the tensors of a base model and of `other`, a fine-tuned model or a delta.

    The first dimension can differ: tensors with a row per token grow with the vocabulary, as in LC-Rec.

    Args:
        base_name: name of the base model of the delta `other`, if known.

    Returns:
        (name -> how the tensor is stored, name -> tensors of (base or None, other)).

    Raises:
        InputError: the architectures differ; it names the tensor.
    """
    advice = "they are of different architectures" + (f"; the base of the delta is {base_name!r}" if base_name else "")
    tied = is_tied(other)
    base_tensors, tensors = read_model(base, tied), read_model(other, tied)
    if missing := next((name for name in base_tensors if name not in tensors and name != HEAD), None):
        raise InputError(f"{other}: has no tensor {missing!r}, which {base} has; {advice}")
    entries = {}
    for name, tensor in tensors.items():
        base_tensor = base_tensors.get(name)
        if base_tensor is None:
            if name != HEAD:
                raise InputError(f"{base}: has no tensor {name!r}, which {other} has; {advice}")
            entries[name] = Entry("whole", "the base has none: its head is tied")
        elif base_tensor.shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, that of {base} {list(base_tensor.shape)}"
            if len(tensor.shape) != len(base_tensor.shape) or tensor.shape[1:] != base_tensor.shape[1:]:
                raise InputError(f"{other}: tensor {name!r} has shape {shapes}; {advice}")
            entries[name] = Entry("whole", f"the base's is {list(base_tensor.shape)}")
        elif not {tensor.dtype, base_tensor.dtype} <= set(SUBTRACTABLE):
            entries[name] = Entry("whole", f"{CODES[tensor.dtype]} has no differences")
        else:
            entries[name] = Entry("difference")
    return entries, {name: (base_tensors.get(name), tensor) for name, tensor in tensors.items()}


def read_delta(delta: Path) -> tuple[str, dict[str, Entry]]:
    """Read the base model's name and the entries of `delta.json`; InputError unless make_delta has written it."""
    content = read_json(delta / DELTA, "the format of a delta, by convert.make_delta")
    if content.get("format") != FORMAT:
        raise InputError(f"{delta / DELTA}: has format {content.get('format')!r}; this version supports {FORMAT}")
    try:
        entries = {name: Entry(**entry) for name, entry in content["tensors"].items()}
        if not all(isinstance(entry.corrected, int) for entry in entries.values()):
            raise TypeError("corrected should be a number")
        return str(content["base"]), entries
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{delta / DELTA}: is no file of convert.make_delta ({error!r}); download it again") from None
