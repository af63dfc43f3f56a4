"""What a run writes beside its result (flags, versions, seconds), and what a checkpoint states of itself."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

import torch
import transformers

from reclingua.utils.errors import MASK, InputError, is_secret
from reclingua.utils.files import read_json, write_json

METADATA_FILE = "reclingua.json"  # in every checkpoint


@dataclass(frozen=True)
class CheckpointMetadata:
    """The metadata of a checkpoint: how its prompts are made, what it was trained on, and with which flags.

    A model of `pretrain.py` has a method and a dataset alone.

    Args:
        method: of finetune.py, or the kind of a collaborative model.
        dataset: its name.
        base_model, base_dtype, load_in_4bit, load_in_8bit: the language model that was tuned, and how it was loaded.
        base_sha256: fingerprint of the base model, which an adapter of lcrec needs.
        lora: of lcrec: rank, alpha, dropout and targets of the adapter; None: the weights themselves were tuned.
        prompts: task -> its prompt templates, each {"prompt": ..., "response": ...}.
        max_his_len, his_sep, add_prefix, max_text_len: how a history and texts are written into a prompt.
        targets, tasks: of lcrec: which items of a history are targets, and what was trained.
        code_format: of binllm: how binary codes are written.
        index_sha256, histories_sha256, items_sha256, users_sha256, ratings_sha256: fingerprints of the data.
        cf_sha256: fingerprint of the collaborative model.
        training: further flags, which only a resumed training has to share.
    """

    method: str
    dataset: str
    base_model: str | None = None
    base_dtype: str = "float32"
    base_sha256: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    lora: dict | None = None
    prompts: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    max_his_len: int = 0
    his_sep: str = ""
    add_prefix: bool = False
    max_text_len: int = 0
    targets: str | None = None
    tasks: list[str] = field(default_factory=list)
    code_format: str | None = None
    index_sha256: str | None = None
    histories_sha256: str | None = None
    items_sha256: str | None = None
    users_sha256: str | None = None
    ratings_sha256: str | None = None
    cf_sha256: str | None = None
    training: dict = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the metadata in `folder`; InputError if there is none, or its keys and values are of another kind."""
        path = Path(folder) / METADATA_FILE
        content = read_json(path, "the metadata of a model trained by finetune.py or pretrain.py")
        again = "train the model again"
        if not isinstance(content.get("method"), str) or not content["method"]:
            raise InputError(f"{path}: names no method; {again}")
        known = {entry.name for entry in fields(cls)}
        if unknown := next((key for key in content if key not in known), None):
            raise InputError(f"{path}: has the unknown key {unknown!r}, of another version of RecLingua; {again}")
        if "dataset" not in content:
            raise InputError(f"{path}: names no dataset; {again}")
        defaults = asdict(cls("", ""))
        for key, value in content.items():
            if defaults[key] is not None and type(value) is not type(defaults[key]):
                kind = type(defaults[key]).__name__
                raise InputError(f"{path}: {key!r} should be a {kind}, not {str(value)[:50]!r}; {again}")
        return cls(**content)

    def save(self, folder: str | Path) -> None:
        """Write the metadata into `folder`, without what has its default value."""
        defaults = asdict(CheckpointMetadata("", ""))
        content = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        write_json(Path(folder) / METADATA_FILE, content, indent=1)


def run_metadata(flags: Mapping[str, object], started: float) -> dict:
    """Return what a run writes beside its result: seconds, flags with their values but for secrets, versions.

    Args:
        started: the `time.monotonic()` at which the run began.
    """
    return {
        "seconds": round(time.monotonic() - started, 1),
        "arguments": {
            key: MASK if value and is_secret(key) else str(value) if isinstance(value, Path) else value
            for key, value in flags.items()
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
