"""What a delta is: the difference of each tensor to a base model, and what is needed to undo it to the last bit.

A delta folder looks like the tuned model's, and plain addition to the base gives that model up to rounding, as with
LC-Rec's deltas. Beside it, `delta.json` says which base it belongs to, and `corrections*.safetensors` hold the
elements that addition does not bring back.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from convert.folders import is_tied
from convert.shards import CODES, StoredTensor, read_weights
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

DELTA, FORMAT = "delta.json", 1
CORRECTIONS = "corrections"  # what the names of files with them begin with
HEAD = "lm_head.weight"
SUBTRACTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # to compare, where NaN is not NaN and -0 is 0


@dataclass
class Entry:
    """How a tensor is stored.

    Args:
        stored: "difference" or "whole".
        why: it is stored whole.
        corrected: elements of a difference that `corrections*.safetensors` has; all of them where it has the tensor.
        base_xxh3: of the base's tensor, or None where the base has none.
    """

    stored: str
    why: str | None = None
    corrected: int = 0
    base_xxh3: str | None = None


def read_model(folder: Path, tied: bool) -> dict[str, StoredTensor]:
    """The weights of a folder, less what a model makes itself: a head that is tied, frequencies of old checkpoints."""
    weights = read_weights(folder)
    return {
        name: tensor
        for name, tensor in weights.items()
        if not (tied and name == HEAD) and not name.endswith("rotary_emb.inv_freq")
    }


def entries(
    base: Path, other: Path, wanted: str | None = None
) -> tuple[dict[str, Entry], dict[str, tuple[StoredTensor | None, StoredTensor]]]:
    """How each tensor of `other`, a tuned model or a delta, is stored, and the tensors of both.

    Of another shape may be what has a row for each token, as LC-Rec has it: it grows when a vocabulary does.

    Args:
        wanted: name of the base that `other` is a delta to, if known.

    Raises:
        InputError: naming the tensor that shows that these are not of one architecture.
    """
    apart = "they are of different architectures" + (f"; the delta is one to {wanted!r}" if wanted else "")
    tied = is_tied(other)
    bases, others = read_model(base, tied), read_model(other, tied)
    if lacking := next((name for name in bases if name not in others and name != HEAD), None):
        raise InputError(f"{other}: has no tensor {lacking!r}, which {base} has; {apart}")
    found = {}
    for name, tensor in others.items():
        under = bases.get(name)
        if under is None:
            if name != HEAD:
                raise InputError(
                    f"{base}: has no tensor {name!r}, which {other} has; they are of different architectures"
                )
            found[name] = Entry("whole", "the base has none: its head is its embeddings")
        elif under.shape != tensor.shape:
            if len(tensor.shape) != len(under.shape) or tensor.shape[1:] != under.shape[1:]:
                raise InputError(
                    f"{other}: tensor {name!r} is {list(tensor.shape)}, that of {base} {list(under.shape)}; {apart}"
                )
            found[name] = Entry("whole", f"the base's is {list(under.shape)}")
        elif not {tensor.dtype, under.dtype} <= set(SUBTRACTED):
            found[name] = Entry("whole", f"{CODES[tensor.dtype]} has no differences")
        else:
            found[name] = Entry("difference")
    return found, {name: (bases.get(name), tensor) for name, tensor in others.items()}


def read_delta(delta: Path) -> tuple[str, dict[str, Entry]]:
    """The name of a delta's base, and how each tensor is stored; InputError for what make_delta has not written."""
    record = read_json(delta / DELTA, "what convert.make_delta says of a delta")
    if record.get("format") != FORMAT:
        raise InputError(f"{delta / DELTA}: is of format {record.get('format')!r}; this version knows {FORMAT}")
    try:
        told = {name: Entry(**entry) for name, entry in record["tensors"].items()}
        if not all(isinstance(entry.corrected, int) for entry in told.values()):
            raise TypeError("corrected should be a number")
        return str(record["base"]), told
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{delta / DELTA}: is not as convert.make_delta writes it ({error!r}); get it again"
        ) from None
