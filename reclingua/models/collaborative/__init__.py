"""Collaborative models, each saved as a folder with config.json and safetensors; `load_collaborative` loads any."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.models.collaborative.din import DIN
from reclingua.models.collaborative.hash import HashedMF
from reclingua.models.collaborative.lightgcn import LightGCN
from reclingua.models.collaborative.mf import MF
from reclingua.models.collaborative.sasrec import SASRec
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

COLLABORATIVE_MODELS: dict[str, type[CollaborativeModel]] = {
    model.config_class.model_type: model for model in (MF, LightGCN, SASRec, DIN, HashedMF)
}


def load_collaborative(folder: str | Path) -> CollaborativeModel:
    """Load the collaborative model in `folder` for evaluation; InputError unless it is complete, as safetensors."""
    config = read_json(Path(folder) / "config.json", "the config of a collaborative model, from python pretrain.py")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in COLLABORATIVE_MODELS:
        raise InputError(f"{folder}: contains a model of type {kind!r}, not one of {', '.join(COLLABORATIVE_MODELS)}")
    try:
        loaded: Any = COLLABORATIVE_MODELS[kind].from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the library raises a dozen classes for an invalid folder
        raise InputError(f"{folder}: its model cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    model, info = loaded
    mismatches = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if mismatches:
        raise InputError(f"{folder}: its weights do not match its config ({mismatches[0]}); train it again")
    return model.eval()


@torch.no_grad()
def copy_known_rows(model: CollaborativeModel, weights: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Copy the weights of an earlier model into `model`, whose tables can have further users and items at the end.

    Args:
        weights: state of a model of the same kind; buffers, such as a graph, are ignored.
        folder: of the earlier model, for messages.

    Raises:
        InputError: a weight has another shape, or more rows than that of `model`.
    """
    for name, weight in model.named_parameters():
        known = weights.get(name)
        if known is None or known.shape[1:] != weight.shape[1:] or len(known) > len(weight):
            shape = "missing" if known is None else f"of shape {list(known.shape)}"
            raise InputError(
                f"{folder}: its weight {name} is {shape}, but should be {list(weight.shape)}, or with fewer rows; "
                "give a model of the same kind and width, of the same users and items or the first of them"
            )
        weight[: len(known)] = known


def weights_sha256(model: CollaborativeModel) -> str:
    """Return the fingerprint of all weights, which a model trained with them stores to refuse others."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reinitialized(model: CollaborativeModel) -> CollaborativeModel:
    """Return a model of the same kind and size with new weights; buffers, such as a graph, are copied."""
    new = type(model)(model.config)
    for name, buffer in model.named_buffers():
        new.get_buffer(name).copy_(buffer)
    return new.eval()
