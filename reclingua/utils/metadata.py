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
VERSION = 2  # 1: without the files below, and with another fingerprint of the base model
# Fields with a file of their own. Files whose name begins with _ are for this machine: the Trainer pushes none to a
# hub, and convert.* copies none.
FILES = {"index": "index.json", "items": "items.json", "training_histories": "_training_histories.json"}


@dataclass(frozen=True)
class CheckpointMetadata:
    """The metadata of a checkpoint: how its prompts are made, what it was trained on, and with which flags.

    A model of `pretrain.py` has a method and a dataset alone.

    Args:
        method: of finetune.py, or the kind of a collaborative model.
        dataset: its name.
        base_model, base_dtype, load_in_4bit, load_in_8bit: the language model that was tuned, and how it was loaded.
        bf16: whether it was trained in bfloat16 (--bf16), the default of a test.
        base_sha256: fingerprint of the base model's weights (reclingua/models/language.py).
        lora: of lcrec: rank, alpha, dropout and targets of the adapter; None: the weights themselves were tuned.
        prompts: task -> its prompt templates, each {"prompt": ..., "response": ...}.
        max_his_len, his_sep, add_prefix, max_text_len: how a history and texts are written into a prompt.
        targets, tasks: of lcrec: which items of a history are targets, and what was trained.
        history_window: of Yes/No methods: how the window of liked items moves, see `datasets.trees.window_starts`.
        rows_per_tree: of Yes/No methods: largest number of rows that share one pass, which changes no score.
        code_format: of binllm: how binary codes are written.
        index_sha256, histories_sha256, items_sha256, users_sha256, ratings_sha256: fingerprints of the data.
        cf_sha256: fingerprint of the collaborative model.
        training: further flags, which only a resumed training has to share.
        version: of the format; a checkpoint of an earlier one opens, with fewer checks.
        index: of lcrec: item -> its semantic ID, so that a test needs no other index file.
        items: item -> {"title": ..., "raw_id": ...}, what the data of training knew of them: which items the ids
            stand for.
        training_histories: of lcrec: user -> [number of training items, fingerprint of them], by which a test on
            other histories finds out whether its targets were trained on.
    """

    method: str
    dataset: str
    base_model: str | None = None
    base_dtype: str = "float32"
    base_sha256: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bf16: bool = False
    lora: dict | None = None
    prompts: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    max_his_len: int = 0
    his_sep: str = ""
    add_prefix: bool = False
    max_text_len: int = 0
    targets: str | None = None
    tasks: list[str] = field(default_factory=list)
    history_window: str | None = None
    rows_per_tree: int = 1
    code_format: str | None = None
    index_sha256: str | None = None
    histories_sha256: str | None = None
    items_sha256: str | None = None
    users_sha256: str | None = None
    ratings_sha256: str | None = None
    cf_sha256: str | None = None
    training: dict = field(default_factory=dict)
    version: int = VERSION
    index: dict[str, list[str]] = field(default_factory=dict, repr=False)
    items: dict[str, dict] = field(default_factory=dict, repr=False)
    training_histories: dict[str, list] = field(default_factory=dict, repr=False)

    @property
    def checked_base_sha256(self) -> str | None:
        """`base_sha256`, unless an earlier version computed it in another way."""
        return self.base_sha256 if self.version >= VERSION else None

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
        content |= {
            key: _read_file(path.parent / name, key) for key, name in FILES.items() if (path.parent / name).exists()
        }
        return cls(**{"version": 1} | content)

    def save(self, folder: str | Path) -> None:
        """Write the metadata and its FILES into `folder`, without what has its default value."""
        defaults = asdict(CheckpointMetadata("", ""))
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        content = {key: value for key, value in values.items() if value != defaults[key]}
        for key, name in FILES.items():
            if key in content:
                write_json(Path(folder) / name, content.pop(key))
        if self.base_model:  # whose fingerprint depends on the version
            content["version"] = self.version
        write_json(Path(folder) / METADATA_FILE, content, indent=1)


def _read_file(path: Path, key: str) -> dict:
    """Read the file of a field of FILES; InputError names an entry of another kind."""
    content = read_json(path, f"the {key} that a model was trained with")
    for name, value in content.items():
        if key == "items":
            is_valid = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        else:
            kinds = [type(part) for part in value] if isinstance(value, list) else []
            is_valid = kinds == [int, str] if key == "training_histories" else kinds == [str] * max(1, len(kinds))
        if not is_valid:
            raise InputError(f"{path}: {name!r} has the value {str(value)[:50]!r}; restore the file, or train again")
    return content


def default_results_file(checkpoint: str | Path, dataset: str, task: str = "") -> Path:
    """Return where results of a checkpoint go: results/<dataset>/<name of its folder>[-<task>].json.

    The name of checkpoint-N is that of its run, followed by its own.
    """
    folder = Path(checkpoint).resolve()
    name = f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
    return Path("results") / dataset / f"{'-'.join(filter(None, (name, task)))}.json"


def has_own_results(results_file: Path, checkpoint: Path) -> bool:
    """Return whether a results file exists and is of this checkpoint; InputError if it is of another one."""
    if not results_file.exists():
        return False
    if (measured := measured_checkpoint(results_file)) != checkpoint.resolve():
        raise InputError(f"{results_file}: has results of {measured or 'another model'}; name another --results_file")
    return True


def check_results_file(results_file: Path) -> None:
    """Raise InputError if a file exists there that holds no results, such as a file of a dataset."""
    if not results_file.exists() or not results_file.stat().st_size:
        return
    try:
        is_own = isinstance(read_json(results_file, "results").get("arguments"), dict)
    except InputError:
        is_own = False
    if not is_own:
        raise InputError(f"{results_file}: exists and holds no results; name another --results_file")


def measured_checkpoint(results_file: Path) -> Path | None:
    """Return the absolute path of the checkpoint that a results file is of, which test.py or pretrain.py wrote."""
    flags = read_json(results_file, "results of test.py").get("arguments")
    checkpoint = flags.get("ckpt_path", flags.get("output_dir")) if isinstance(flags, dict) else None
    return Path(checkpoint).resolve() if isinstance(checkpoint, str) else None


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
