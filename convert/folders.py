"""What is in a model's folder beside its weights, and how a folder comes to be there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig

from reclingua.utils.errors import InputError
from reclingua.utils.files import output_folder, read_json
from reclingua.utils.metadata import METADATA_FILE

# Tokenizer, config and record are such files. No pickle is, and nothing below the folder goes along.
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model")
SKIPPED_FILES = ("trainer_state.json", "run.json", "delta.json", "adapter_config.json")  # of a run, or another form
PATHS = ("base_model", "cf_model", "init_from")  # of a record, where they are no hub names


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """`with atomic_folder(path) as folder:` gives a folder beside `path` that becomes `path` if all went well.

    Raises:
        InputError: `path` is there already and not empty, or cannot be written.
    """
    path = Path(path).absolute()
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path}: is there already, and not empty; choose another output folder")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a folder that is not there yet")
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    output_folder(path.parent)
    try:
        temporary.mkdir()
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there is none where all went well


def model_folder(path: Path) -> Path:
    """`path`; InputError if it is no folder."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; a model of the hub comes by: hf download {path} --local-dir FOLDER")
    return path


def public_name(model: Path | str) -> str:
    """What others know a model by: its hub name, if a folder in the hub's cache has it; else the folder's own name."""
    path = Path(model)
    if not path.is_absolute() and not path.is_dir():
        return str(model)
    cached = next((part for part in path.absolute().parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/") if cached else path.absolute().name


def is_tied(folder: Path) -> bool:
    """Whether the model's output head is its input embeddings; InputError if it has no config."""
    try:
        return bool(AutoConfig.from_pretrained(folder, trust_remote_code=False).tie_word_embeddings)
    except Exception as error:  # the library raises many kinds
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: its config.json is not that of a language model ({reason})") from None


def copy_rest(source: Path, folder: Path) -> None:
    """Copy tokenizer, configs and record; a path of this machine in the record becomes the name of what is there.

    Raises:
        OSError: as copying does.
    """
    for file in sorted(source.iterdir()):
        travels = (
            file.suffix in COPIED_SUFFIXES and file.name not in SKIPPED_FILES and not file.name.endswith(".index.json")
        )
        if travels and file.is_file():
            shutil.copyfile(file, folder / file.name)
    if (source / METADATA_FILE).exists():
        write_metadata(folder, read_metadata(source))


def read_metadata(folder: Path) -> dict:
    """How a tuned model was made, as finetune.py left it."""
    return read_json(folder / METADATA_FILE, "the record of a model trained by finetune.py")


def write_metadata(folder: Path, record: dict) -> None:
    """Write it without paths of this machine."""
    named = {key: record[key] for key in PATHS if isinstance(record.get(key), str)}
    record = record | {key: public_name(path) for key, path in named.items() if Path(path).is_absolute()}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / METADATA_FILE).write_text(text + "\n", encoding="utf-8")
