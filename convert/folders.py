"""Model folders: the files other than weights, and names for others."""

import shutil
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from reclingua.utils.errors import InputError
from reclingua.utils.metadata import FILES, METADATA_FILE, CheckpointMetadata

# What goes along with the weights, and the metadata, without local paths. Anything else in a folder can be private.
COPIED_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
PATHS = ("base_model", "cf_model", "init_from")  # metadata keys with paths or hub names


def model_folder(path: Path) -> Path:
    """Return `path`; InputError if it is no folder."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; for a model on the hub: hf download {path} --local-dir FOLDER")
    return path


def public_name(model: Path | str) -> str:
    """Return the name of a model for others: its hub name, also for a folder in the hub's cache, else the folder's."""
    path = Path(model)
    if not path.is_absolute() and not path.is_dir():
        return str(model)
    cached = next((part for part in path.absolute().parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/") if cached else path.absolute().name


def is_tied(folder: Path) -> bool:
    """Return whether the output head of a model is tied to its input embeddings; InputError if it has no config."""
    try:
        return bool(AutoConfig.from_pretrained(folder, trust_remote_code=False).tie_word_embeddings)
    except Exception as error:  # transformers raises many types
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: config.json is not that of a language model ({reason})") from None


def copy_rest(source: Path, folder: Path) -> None:
    """Copy tokenizer, configs and metadata, without local paths in the metadata.

    Raises:
        InputError: a file is a link, which could lead to any file of this machine.
        OSError: a file cannot be copied.
    """
    for name in (*COPIED_FILES, METADATA_FILE, *FILES.values()):
        if (source / name).is_symlink():
            raise InputError(f"{source / name}: is a link, which is not followed; make a folder of copies: cp -rL")
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / METADATA_FILE).exists():
        save_public_metadata(CheckpointMetadata.load(source), folder)


def save_public_metadata(metadata: CheckpointMetadata, folder: Path) -> None:
    """Write metadata with the public names of models instead of local paths."""

    def without_paths(values: dict) -> dict:
        paths = {key: values[key] for key in PATHS if isinstance(values.get(key), str)}
        return {key: public_name(path) for key, path in paths.items() if Path(path).is_absolute()}

    training = metadata.training | without_paths(metadata.training)
    public = {"training": training, "training_histories": {}, **without_paths(vars(metadata))}
    replace(metadata, **public).save(folder)
