"""Collaborative models, each a folder of config.json and safetensors: `load(folder)` opens any of them."""

import hashlib
from pathlib import Path

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
    """The collaborative model in `folder`, for evaluation; InputError unless all of it is there, as safetensors."""
    config = read_json(Path(folder) / "config.json", "the config of a collaborative model, from python pretrain.py")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in COLLABORATIVE_MODELS:
        raise InputError(f"{folder}: holds a model of type {kind!r}, not one of {', '.join(COLLABORATIVE_MODELS)}")
    try:
        model, found = COLLABORATIVE_MODELS[kind].from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the library raises a dozen kinds for a broken folder
        raise InputError(f"{folder}: its model cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    if wrong:
        raise InputError(f"{folder}: its weights are not those of its config ({wrong[0]}); train it again")
    return model.eval()


def weights_sha256(model: CollaborativeModel) -> str:
    """Of all weights; a model that was trained with these keeps it and refuses others."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
