"""Load a checkpoint and the data that belong to it, and check that they do: what Recommender and Scorer stand on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import InteractionDataset, open_interactions
from reclingua.datasets.prompts import PromptTemplate, check_prompts
from reclingua.datasets.ratings import RatingsDataset, open_ratings, to_numpy
from reclingua.datasets.tasks import TEXT_TASKS
from reclingua.datasets.yes_no import YesNoDataset, format_code
from reclingua.models.collaborative import COLLABORATIVE_MODELS
from reclingua.models.collaborative.hash import HashedMF
from reclingua.models.language import base_fingerprint, context_length, load_model, load_tokenizer
from reclingua.models.lora import load_lora
from reclingua.models.registry import YES_NO_METHODS, load_yes_no_model
from reclingua.models.yes_no import YesNoModel
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import METADATA_FILE, CheckpointMetadata


def load_metadata(folder: str | Path) -> CheckpointMetadata:
    """Read the metadata of a checkpoint.

    Raises:
        InputError: the folder holds no model of finetune.py or pretrain.py, or DeepSpeed's training state alone.
    """
    folder = Path(folder)
    metadata = CheckpointMetadata.load(folder)
    if (folder / "latest").exists() and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: holds a training state of DeepSpeed; make a model of it: "
            f"python -m convert.zero_to_fp32 {folder} FOLDER"
        )
    if metadata.method not in ("lcrec", *YES_NO_METHODS, *COLLABORATIVE_MODELS):
        raise InputError(f"{folder / METADATA_FILE}: was made by {metadata.method!r}, which is no method")
    check_prompts(folder / METADATA_FILE, metadata.prompts)
    return metadata


# ---- Next-item models ----


def load_next_item_dataset(
    folder: Path,
    metadata: CheckpointMetadata,
    data_path: str | Path,
    name: str | None = None,
    index_file: str = ".index.json",
    task: str = "seqrec",
) -> InteractionDataset:
    """Open the dataset that a model was tuned on, with the semantic IDs that the model knows.

    Args:
        folder: of the checkpoint, for messages.
        name: name of the dataset (default: that of training).
        task: what the model will be asked; titles need item texts.

    Raises:
        InputError: the semantic IDs are not those of training; the model was not trained on the task.
    """
    if not metadata.tasks or not metadata.targets or not metadata.prompts:
        raise InputError(f"{folder}: was tuned by another version of finetune.py; tune it again")
    if task != "seqrec" and task not in metadata.tasks:
        raise InputError(f"{folder}: was not tuned on {task} (--tasks), so it cannot be tested on it")
    needs = ["index", "items"] if task in TEXT_TASKS else ["index"]
    dataset = open_interactions(data_path, name or metadata.dataset, needs, index_file)
    if dataset.sha256("index") != metadata.index_sha256:
        raise InputError(f"{folder}: was tuned with other semantic IDs than {dataset.folder} has; see --index_file")
    return dataset


def load_prompts(metadata: CheckpointMetadata, task: str) -> tuple[list[PromptTemplate], list[int]]:
    """Return the prompt templates of `task` and the numbers of those answered by an item; InputError if none is."""
    templates = [PromptTemplate(**template) for template in metadata.prompts.get(task, [])]
    prompt_ids = [number for number, template in enumerate(templates) if template.has_target_response]
    if not prompt_ids:
        raise InputError(f"{metadata.method} was tuned on no prompt of {task} whose response is {{target}} alone")
    return templates, prompt_ids


def build_instructions(
    samples: datasets.Dataset,
    dataset: InteractionDataset,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, list[PromptTemplate]],
    token_ids: Mapping[str, list[int]],
    metadata: CheckpointMetadata,
    **options,
) -> InstructionDataset:
    """Return samples written as `metadata` states; `options` are further arguments of InstructionDataset."""
    return InstructionDataset(
        samples,
        dataset,
        tokenizer,
        prompts,
        index_tokens={token for ids in token_ids.values() for token in ids},
        max_his_len=metadata.max_his_len,
        his_sep=metadata.his_sep,
        max_text_len=metadata.max_text_len,
        add_prefix=metadata.add_prefix,
        **options,
    )


def load_base_model(metadata: CheckpointMetadata, device: torch.device) -> PreTrainedModel:
    """Load the base model as the metadata states; weights in 4 or 8 bits are on `device` already."""
    dtype = getattr(torch, metadata.base_dtype)
    path = metadata.base_model or ""
    return load_model(path, dtype, metadata.load_in_4bit, metadata.load_in_8bit, device)


def load_language_model(
    folder: Path, metadata: CheckpointMetadata, device: torch.device, base_model: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a tuned language model, for evaluation on `device`, and its tokenizer.

    Args:
        base_model: base model of an adapter checkpoint, overrides the stored path.

    Raises:
        InputError: there is no model, or the base model is not the one that was tuned.
    """
    tokenizer = load_tokenizer(folder)
    if not metadata.lora:
        return load_model(folder).eval().to(device), tokenizer
    metadata = replace(metadata, base_model=base_model) if base_model else metadata
    try:
        model = load_base_model(metadata, device)
    except InputError as error:
        raise InputError(f"{error}; name the base model of {folder} by --base_model") from None
    if base_fingerprint(model) != metadata.base_sha256:
        raise InputError(f"{metadata.base_model}: is not the base model that {folder} was tuned on")
    model = load_lora(model, tokenizer, folder).eval()
    is_quantised = metadata.load_in_4bit or metadata.load_in_8bit
    return model if is_quantised else model.to(device), tokenizer  # type: ignore[arg-type]


def check_context_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise InputError if a sample has more tokens than the model reads."""
    limit = context_length(model)
    if limit and tokens > limit:
        raise InputError(
            f"the model reads at most {limit} tokens, a sample has {tokens}; lower --max_his_len or --max_text_len"
        )


# ---- Yes/No models ----


def load_yes_no(
    folder: Path,
    metadata: CheckpointMetadata,
    data_path: str | Path,
    name: str | None = None,
    base_model: str | None = None,
    cf_model: str | None = None,
) -> tuple[YesNoModel, RatingsDataset]:
    """Load a tuned Yes/No model and its ratings.

    Args:
        base_model, cf_model: override the stored paths.

    Raises:
        InputError: something is missing, or the model knows the users and items of other ratings.
    """
    model = load_yes_no_model(folder, metadata.method, base_model=base_model, cf_model=cf_model)
    dataset = open_ratings(data_path, name or metadata.dataset)
    if metadata.method != "tallrec" and metadata.ratings_sha256 != dataset.sha256():
        raise InputError(f"{folder}: knows the users and items of other ratings than those of {dataset.folder}")
    return model, dataset


def yes_no_templates(metadata: CheckpointMetadata) -> list[PromptTemplate]:
    """Return the prompt templates of a Yes/No method."""
    _, task = YES_NO_METHODS[metadata.method]
    return [PromptTemplate(**template) for template in metadata.prompts[task]]


def build_yes_no_dataset(
    rows: datasets.Dataset,
    dataset: RatingsDataset,
    tokenizer: PreTrainedTokenizerBase,
    model: YesNoModel,
    metadata: CheckpointMetadata,
    prompt_id: int | None = 0,
    cold_text_only: bool = False,
    seed: int = 0,
) -> YesNoDataset:
    """Return rows of ratings written as `metadata` states.

    Args:
        prompt_id: number of the prompt template; None: one is drawn for each row and epoch.
        cold_text_only: rows whose user or item training did not know get the prompt of titles alone.
    """
    templates, codes = yes_no_templates(metadata), None
    if metadata.method == "binllm" and isinstance(model.cf_model, HashedMF):
        codes = _code_texts(rows, model.cf_model, metadata.code_format or "bits")
    return YesNoDataset(
        rows,
        {int(item): str(texts["title"]) for item, texts in dataset.items.items()},
        tokenizer,
        templates if prompt_id is None else [templates[prompt_id]],
        metadata.max_his_len,
        metadata.his_sep,
        limit=context_length(model.language) or 10**9,
        soft_tokens=getattr(model.config, "soft_tokens", 1),
        read_length=model.cf_model.history_length if model.cf_model is not None else 0,
        codes=codes,
        cold_template=PromptTemplate(**metadata.prompts["text"][0]) if cold_text_only else None,
        draw=prompt_id is None,
        seed=seed,
    )


def _code_texts(rows: datasets.Dataset, cf_model: HashedMF, code_format: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return the binary codes of the users and of the items of `rows` as text, by id."""
    texts = []
    for column, codes_of in (("uid", cf_model.user_codes), ("iid", cf_model.item_codes)):
        ids = torch.from_numpy(np.unique(to_numpy(rows, column)).astype(np.int64))
        codes = codes_of(ids.to(cf_model.device))
        texts.append(
            {number: format_code(code, code_format) for number, code in zip(ids.tolist(), codes, strict=True)}
        )
    users, items = texts
    return users, items
