"""A tuned folder and the data that belong to it, opened and checked: the same for test.py and demo.py."""

from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import RecDataset, open_dataset
from reclingua.datasets.prompts import PromptTemplate
from reclingua.datasets.ratings import RatingsDataset, open_ratings, to_numpy
from reclingua.datasets.yes_no import YesNoDataset, code_text
from reclingua.models.collaborative import COLLABORATIVE_MODELS
from reclingua.models.language import base_fingerprint, load_model, load_tokenizer
from reclingua.models.lora import load_lora
from reclingua.models.registry import YES_NO_METHODS
from reclingua.models.registry import load_yes_no_model as open_yes_no_model
from reclingua.models.yes_no import YesNoModel
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json
from reclingua.utils.metadata import METADATA_FILE

OF_RECORD = {"prompts", "tasks", "lora", "targets", "max_text_len"}  # what a model that generates was tuned with


def read_record(folder: Path) -> dict:
    """How the model in `folder` was trained: by which `method`, on which `dataset`, and so on.

    Raises:
        InputError: the folder holds no model of finetune.py or pretrain.py.
    """
    record = read_json(folder / METADATA_FILE, "the record of a model trained by finetune.py or pretrain.py")
    if (folder / "latest").exists() and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: holds a training state of DeepSpeed; make a model of it: "
            f"python -m convert.zero_to_fp32 {folder} FOLDER"
        )
    if not isinstance(record.get("method"), str):
        raise InputError(f"{folder / METADATA_FILE}: names no method; train the model again")
    if record["method"] not in ("lcrec", *YES_NO_METHODS, *COLLABORATIVE_MODELS):
        raise InputError(f"{folder / METADATA_FILE}: was made by {record['method']!r}, which is no method")
    return record


# ---- A model that generates ----


def open_indexed(
    folder: Path, record: dict, task: str, data_path: str, name: str | None, index_file: str
) -> RecDataset:
    """The dataset that a model was tuned on, with the index it has learned; InputError if it is another.

    Args:
        task: what the model is to be asked, as in reclingua/datasets/tasks.py.
        name: of the dataset, if it is called otherwise by now.
    """
    if not OF_RECORD <= record.keys() or not isinstance(record["prompts"], dict):
        raise InputError(f"{folder}: was tuned by another version of finetune.py; tune it again")
    needs = ["index", "items"] if task == "fusionseqrec" else ["index"]
    dataset = open_dataset(data_path, name or record["dataset"], needs, index_file)
    if dataset.sha256("index") != record["index_sha256"]:
        raise InputError(f"{folder}: was tuned with another index than that of {dataset.folder}; see --index_file")
    return dataset


def phrasings_of(folder: Path, record: dict, task: str) -> tuple[list[PromptTemplate], list[int]]:
    """The phrasings of `task`, and the numbers of those that are answered by an item; InputError if none is."""
    templates = [PromptTemplate(**template) for template in record["prompts"][task]]
    answerable = [number for number, template in enumerate(templates) if template.names_target]
    if not answerable:
        raise InputError(f"{folder}: was tuned on no phrasing of {task} that is answered by {{target}} alone")
    return templates, answerable


def instructions_of(
    record: dict,
    samples: datasets.Dataset,
    dataset: RecDataset,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, list[PromptTemplate]],
    token_ids: dict[str, list[int]],
) -> InstructionDataset:
    """Samples put as they were in training; `prompts` are the phrasings of their tasks."""
    return InstructionDataset(
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
    cf_model: str | None = None,
) -> tuple[YesNoModel, RatingsDataset]:
    """A tuned model and its ratings; InputError if it knows the users and items of others.

    Args:
        base_model, cf_model: where these models are now, if they have moved.
    """
    model = open_yes_no_model(folder, record["method"], base_model=base_model, cf_model=cf_model)
    dataset = open_ratings(data_path, name or record["dataset"])
    if record["method"] != "tallrec" and record["ratings_sha256"] != dataset.sha256():
        raise InputError(f"{folder}: knows the users and items of other ratings than those of {dataset.folder}")
    return model, dataset


def load_base(record: dict, device: torch.device) -> PreTrainedModel:
    """The base model as the record tells; weights in 4 or 8 bits are on `device` already."""
    dtype = getattr(torch, record["base_dtype"])
    return load_model(record["base_model"], dtype, record["load_in_4bit"], record["load_in_8bit"], device)


def open_model(
    folder: Path, record: dict, device: torch.device, base_model: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tuned model on `device`, for evaluation, and its tokenizer.

    Args:
        base_model: of an adapter folder, where it is now, if it has moved.

    Raises:
        InputError: there is none, or the base model is not the one that was tuned.
    """
    tokenizer = load_tokenizer(folder)
    if not record["lora"]:
        return load_model(folder).eval().to(device), tokenizer
    try:
        model = load_base(record | ({"base_model": base_model} if base_model else {}), device)
    except InputError as error:
        raise InputError(f"{error}; say where the base model of {folder} is now by --base_model") from None
    if base_fingerprint(model) != record["base_sha256"]:
        raise InputError(f"{base_model or record['base_model']}: is not the base model that {folder} was tuned on")
    model = load_lora(model, tokenizer, folder).eval()
    return model if record["load_in_4bit"] or record["load_in_8bit"] else model.to(device), tokenizer


def check_context_length(model: PreTrainedModel, tokens: int) -> None:
    """InputError if a sample has more tokens than the model reads."""
    limit = getattr(model.config, "max_position_embeddings", 0)
    if limit and tokens > limit:
        raise InputError(
            f"the model reads at most {limit} tokens, a sample has {tokens}; lower --max_his_len or --max_text_len"
        )


def questions_of(
    rows: Dataset,
    dataset: RatingsDataset,
    tokenizer: PreTrainedTokenizerBase,
    model: YesNoModel,
    record: dict,
    template: int | None = 0,
    cold_text_only: bool = False,
    seed: int = 0,
) -> YesNoDataset:
    """The rows as questions in the way that `record` tells, with one of its phrasings; None: drawn for each epoch."""
    templates = [PromptTemplate(**each) for each in record["prompts"]]
    codes = None
    if record["method"] == "binllm":
        texts = []
        for name, codes_of in (("uid", model.cf_model.user_codes), ("iid", model.cf_model.item_codes)):
            ids = torch.from_numpy(np.unique(to_numpy(rows, name)).astype(np.int64))
            bits = codes_of(ids.to(model.device))
            texts.append(
                {n: code_text(code, record["code_format"]) for n, code in zip(ids.tolist(), bits, strict=True)}
            )
        codes = tuple(texts)
    return YesNoDataset(
        rows,
        {int(item): str(about["title"]) for item, about in dataset.items.items()},
        tokenizer,
        templates if template is None else [templates[template]],
        record["max_his_len"],
        record["his_sep"],
        limit=getattr(model.language.config, "max_position_embeddings", None) or 10**9,
        soft_tokens=getattr(model.config, "soft_tokens", 1),
        read_length=model.cf_model.history_length if model.cf_model is not None else 0,
        codes=codes,
        cold_template=PromptTemplate(**record["text_prompts"][0]) if cold_text_only else None,
        draw=template is None,
        seed=seed,
    )
