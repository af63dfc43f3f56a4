"""A tuned folder and the data that belong to it, opened and checked: the same for test.py and demo.py."""

from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from reclingua.datasets.interactions import RecDataset, open_dataset, read_json
from reclingua.datasets.instructions import Instructions
from reclingua.datasets.ratings import PreferenceDataset, open_preferences
from reclingua.datasets.prompts import Phrasing
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import RECORD
from reclingua.methods.yes_no import METHODS as YESNO
from reclingua.methods.yes_no import open_model
from reclingua.models.collaborative import MODELS as COLLABORATIVE
from reclingua.models.yes_no import YesNoModel

OF_RECORD = {"prompts", "tasks", "lora", "supervise", "max_text_len"}  # what a model that generates was tuned with


def read_record(folder: Path) -> dict:
    """How the model in `folder` was trained: by which `method`, on which `dataset`, and so on.

    Raises:
        InputError: the folder holds no model of finetune.py or pretrain.py.
    """
    record = read_json(folder / RECORD, "the record of a model trained by finetune.py or pretrain.py")
    if (folder / "latest").exists() and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: holds a training state of DeepSpeed; make a model of it: "
            f"python -m convert.zero_to_fp32 {folder} FOLDER"
        )
    if not isinstance(record.get("method"), str):
        raise InputError(f"{folder / RECORD}: names no method; train the model again")
    if record["method"] not in ("lcrec", *YESNO, *COLLABORATIVE):
        raise InputError(f"{folder / RECORD}: was made by {record['method']!r}, which is no method")
    return record


# ---- A model that generates ----


def open_indexed(
    folder: Path, record: dict, task: str, data_path: str, name: str | None, index_file: str
) -> RecDataset:
    """The dataset that a model was tuned on, with the index it has learned; InputError if it is another.

    Args:
        task: what the model is to be asked, as in data/tasks.py.
        name: of the dataset, if it is called otherwise by now.
    """
    if not OF_RECORD <= record.keys() or not isinstance(record["prompts"], dict):
        raise InputError(f"{folder}: was tuned by another version of finetune.py; tune it again")
    needs = ["index", "items"] if task == "fusionseqrec" else ["index"]
    dataset = open_dataset(data_path, name or record["dataset"], needs, index_file)
    if dataset.sha256("index") != record["index_sha256"]:
        raise InputError(f"{folder}: was tuned with another index than that of {dataset.folder}; see --index_file")
    return dataset


def phrasings_of(folder: Path, record: dict, task: str) -> tuple[list[Phrasing], list[int]]:
    """The phrasings of `task`, and the numbers of those that are answered by an item; InputError if none is."""
    phrasings = [Phrasing(**phrasing) for phrasing in record["prompts"][task]]
    answerable = [number for number, phrasing in enumerate(phrasings) if phrasing.names_target]
    if not answerable:
        raise InputError(f"{folder}: was tuned on no phrasing of {task} that is answered by {{target}} alone")
    return phrasings, answerable


def instructions_of(
    record: dict,
    samples: datasets.Dataset,
    dataset: RecDataset,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, list[Phrasing]],
    token_ids: dict[str, list[int]],
) -> Instructions:
    """Samples put as they were in training; `prompts` are the phrasings of their tasks."""
    return Instructions(
        samples,
        dataset,
        tokenizer,
        prompts,
        index_tokens={token for ids in token_ids.values() for token in ids},
        max_his_len=record["max_his_len"],
        his_sep=record["his_sep"],
        max_text_len=record["max_text_len"],
        add_prefix=record["add_prefix"],
    )


# ---- A model that answers Yes or No ----


def open_asked(
    folder: Path,
    record: dict,
    data_path: str,
    name: str | None,
    base_model: str | None = None,
    collab: str | None = None,
) -> tuple[YesNoModel, PreferenceDataset]:
    """A tuned model and its ratings; InputError if it knows the users and items of others.

    Args:
        base_model, collab: where these models are now, if they have moved.
    """
    model = open_model(folder, record["method"], base_model=base_model, collab=collab)
    dataset = open_preferences(data_path, name or record["dataset"])
    if record["method"] != "tallrec" and record["ratings_sha256"] != dataset.sha256():
        raise InputError(f"{folder}: knows the users and items of other ratings than those of {dataset.folder}")
    return model, dataset
