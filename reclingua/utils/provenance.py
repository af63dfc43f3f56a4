"""Records of derived files: `D.index.json` has `D.index.run.json` beside it, which states what it was made from.

A model folder can be a derived file, too: its record is `run.json`, and its file `model.safetensors`.

A record holds the SHA-256 of its file, so that a record left from an earlier file is not taken for that of its
successor. Files of others, such as LC-Rec's published indices, have no record: they open without a check.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json, write_json


def fingerprint(content: object) -> str:
    """Return the SHA-256 of what JSON can hold; the order of an object's keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def record_path(path: Path) -> Path:
    """Return the path of the record: D.index.json -> D.index.run.json; folder -> folder/run.json."""
    return path / "run.json" if path.is_dir() else path.with_suffix(".run.json")


def read_record(path: Path) -> dict | None:
    """Return what the file or model at `path` was made with; None if no record is of this very file."""
    file, record = _content_file(path), record_path(path)
    if not file.is_file() or not record.is_file():
        return None
    content = read_json(record, f"what {path.name} was made with")
    made_with = content.get("made_with")
    is_of_file = isinstance(made_with, dict) and content.get("sha256") == file_sha256(file)
    return made_with if is_of_file else None


def write_record(path: Path, made_with: dict, run: Mapping[str, object], written: Path | None = None) -> None:
    """Write the record of the file or model at `path`.

    Args:
        made_with: settings, and fingerprints of the inputs; what JSON can hold.
        run: `run_metadata` of the command, and what else belongs into the record.
        written: the temporary file that will be renamed to `path`, within its atomic write.
    """
    sha256 = file_sha256(written or _content_file(path))
    write_json(record_path(path), {"sha256": sha256, "made_with": made_with, **run}, indent=1)


def _content_file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def _exists(path: Path) -> bool:
    """Return whether there is such a file, or a model of any kind in such a folder."""
    if not path.is_dir():
        return path.exists()
    return (path / "config.json").exists() or any(path.glob("*.safetensors"))


def check_replaceable(path: Path, made_with: dict, force: bool) -> None:
    """Raise InputError if another file would be replaced: one without a record, or with another one.

    Commands call it before their work.
    """
    if force or not _exists(path):
        return
    stored = read_record(path)
    if stored == made_with:
        return
    reason = "no record states what it was made from"
    if stored is not None:
        reason = f"it was made with another {first_difference(stored, made_with)}"
    raise InputError(f"{path}: exists, and {reason}; give --force to replace it, or name another output")


def first_difference(stored: Mapping[str, object], made_with: Mapping[str, object]) -> str:
    """Return the first key whose values differ, with the values if they are short: "seed (1, now 2)"."""
    keys = [*made_with, *(key for key in stored if key not in made_with)]
    key = next(key for key in keys if stored.get(key) != made_with.get(key))
    values = [str(values.get(key)) for values in (stored, made_with)]
    return key if max(map(len, values)) > 60 else f"{key} ({values[0]}, now {values[1]})"
