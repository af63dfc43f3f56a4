"""Load a checkpoint and the data that belong to it, and check that they do: what Recommender and Scorer stand on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import InteractionDataset, open_interactions, read_raw_ids
from reclingua.datasets.prompts import PromptTemplate, check_prompts
from reclingua.datasets.rates import rate_texts
from reclingua.datasets.ratings import RatingsDataset, open_ratings, to_numpy
from reclingua.datasets.tasks import TEXT_TASKS
from reclingua.datasets.training_histories import count_trained_targets
from reclingua.datasets.yes_no import YesNoDataset, format_code
from reclingua.models.collaborative import COLLABORATIVE_MODELS
from reclingua.models.collaborative.hash import HashedMF
from reclingua.models.language import DTYPES, check_base_model, context_length, load_model, load_tokenizer
from reclingua.models.lora import load_lora
from reclingua.models.registry import YES_NO_METHODS, load_yes_no_model
from reclingua.models.yes_no import YesNoModel
from reclingua.utils.errors import InputError, print_note
from reclingua.utils.metadata import FILES, METADATA_FILE, CheckpointMetadata
from reclingua.utils.provenance import fingerprint
from reclingua.utils.text import shorten

MAX_SEPARATOR = 1000  # characters between two items of a history, in the checkpoint of a stranger


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
    if len(metadata.his_sep) > MAX_SEPARATOR:
        raise InputError(f"{folder / METADATA_FILE}: 'his_sep' has {len(metadata.his_sep):,} characters; shorten it")
    if metadata.base_dtype not in DTYPES:
        raise InputError(
            f"{folder / METADATA_FILE}: 'base_dtype' should be one of {', '.join(DTYPES)}, not "
            f"{metadata.base_dtype[:50]!r}"
        )
    return metadata


# ---- Next-item models ----


def load_next_item_dataset(
    folder: Path,
    metadata: CheckpointMetadata,
    data_path: str | Path | None,
    name: str | None = None,
    index_file: str | Path | None = None,
    task: str = "seqrec",
) -> InteractionDataset:
    """Open the dataset that a model was tuned on, with the semantic IDs that the model knows.

    Args:
        folder: of the checkpoint, for messages.
        data_path: folder that holds <dataset>/; None: items and semantic IDs of the checkpoint alone, no histories.
        name: name of the dataset (default: that of training).
        index_file: suffix or path of a file of semantic IDs: those of training, or these and further items with codes
            that the model knows (default: those in the checkpoint, or D.index.json for a checkpoint of an earlier
            version, which has none).
        task: what the model will be asked; titles need item texts.

    Raises:
        InputError: items or semantic IDs are not those of training; the model was not trained on the task.
    """
    if not metadata.tasks or not metadata.targets or not metadata.prompts:
        raise InputError(f"{folder}: was tuned by another version of finetune.py; tune it again")
    if task != "seqrec" and task not in metadata.tasks:
        raise InputError(f"{folder}: was not tuned on {task} (--tasks), so it cannot be tested on it")
    name = name or metadata.dataset
    if metadata.index and fingerprint(metadata.index) != metadata.index_sha256:
        raise InputError(f"{folder / FILES['index']}: was changed after training; restore it, or tune the model again")
    if metadata.items and metadata.items.keys() != metadata.index.keys():
        raise InputError(f"{folder / FILES['items']}: has other items than {FILES['index']} beside it; restore both")
    if data_path is None:
        if not metadata.index:
            raise InputError(f"{folder}: has no {FILES['index']}, so it needs its dataset; give data_path")
        return InteractionDataset(name, folder, {}, metadata.items, metadata.index)
    needs = ["items"] if task in TEXT_TASKS and not metadata.items else []
    if index_file is None and metadata.index:
        dataset = open_interactions(data_path, name, needs)
        check_same_items(folder, metadata, dataset)
        return replace(dataset, items=dataset.items or metadata.items, index=metadata.index)
    index_file = index_file or ".index.json"
    dataset = open_interactions(data_path, name, [*needs, "index"], index_file)
    if dataset.sha256("index") != metadata.index_sha256:
        path = dataset.file_path(index_file)
        difference = describe_difference(metadata.index, dataset.index)
        if difference or not metadata.index:
            advice = "leave --index_file out to use its own" if metadata.index else "see --index_file"
            raise InputError(f"{folder}: was tuned with other semantic IDs than {path} has{difference}; {advice}")
        num_new = len(dataset.index) - len(metadata.index)
        print_note(f"{path}: {num_new:,} items are new since {folder} was tuned, with codes that the model knows")
    check_same_items(folder, metadata, dataset)
    return dataset


def check_same_items(folder: Path, metadata: CheckpointMetadata, dataset: InteractionDataset) -> None:
    """Raise InputError if the dataset has items that the model does not know, lacks some, or numbers them otherwise.

    An id stands for another item if its raw id is another one, or its title that of another item of the training.
    Titles that the training did not know were edited: a line states their number.
    """
    if not metadata.index:
        return
    known = f"the items that {folder} was tuned on"
    advice = "the dataset has changed, or is another one; see --dataset and --data_path, or tune the model again"
    index = dataset.index or metadata.index  # the former can have further items
    if unknown := next((item for item in dataset.item_ids if item not in index), None):
        raise InputError(
            f"{dataset.folder}: item {unknown!r} is not among {known}; {advice}, or give new items semantic IDs by "
            "python -m index.generate --extend, and that file as --index_file"
        )
    if missing := next((item for item in metadata.index if dataset.items and item not in dataset.items), None):
        raise InputError(f"{dataset.folder}: has no item {missing!r}, one of {known}; {advice}")
    raw_ids, num_edited = read_raw_ids(dataset), 0
    titles = {texts.get("title") for texts in metadata.items.values()}
    for item, texts in metadata.items.items():
        has_raw_ids = item in raw_ids and "raw_id" in texts
        title = dataset.title(item) if dataset.items and "title" in texts else None
        is_edited = title is not None and title != texts["title"]
        if has_raw_ids and raw_ids[item] != texts["raw_id"] or is_edited and title in titles and not has_raw_ids:
            ours, theirs = (raw_ids[item], texts["raw_id"]) if has_raw_ids else (title or "", texts["title"])
            difference = f"is {shorten(ours, 60)!r}, but {shorten(theirs, 60)!r} among {known}"
            raise InputError(f"{dataset.folder}: item {item!r} {difference}; {advice}")
        num_edited += is_edited
    if num_edited:
        print_note(f"{dataset.folder}: {num_edited:,} items have other titles than when {folder} was tuned")


def describe_difference(known: Mapping[str, list[str]], index: Mapping[str, list[str]]) -> str:
    """Return how `index` contradicts the semantic IDs that a model knows, as the end of a clause.

    "" if it has all of these, and further items with known codes alone; or if nothing is known.
    """
    codes = {code for tokens in known.values() for code in tokens}
    for item, tokens in index.items() if known else ():
        if new := next((code for code in tokens if code not in codes), None):
            return (
                f": the code {new!r} of item {item!r} is new, and a tuned model learns no new codes; make "
                "the file by python -m index.generate --extend, which uses known codes, or tune the model again"
            )
        if item in known and known[item] != tokens:
            return f": item {item!r} has {''.join(tokens)} instead of {''.join(known[item])}"
    missing = next((item for item in known if item not in index), None)
    return "" if missing is None else f": item {missing!r} is missing"


def check_histories(
    folder: Path, metadata: CheckpointMetadata, dataset: InteractionDataset, users: Sequence[str], allow_others: bool
) -> str:
    """Return how the histories of a test relate to those of training, a sentence for results and report.

    Raises:
        InputError: test targets can be items that the model was trained on, and `allow_others` is False.
    """
    if dataset.sha256("histories") == metadata.histories_sha256:
        return "those of training"
    number = count_trained_targets(dataset, users, metadata.training_histories)
    if number and not allow_others:
        raise InputError(
            f"{dataset.folder / f'{dataset.name}.inter.json'}: are not the histories that {folder} was trained on: "
            f"{number:,} of {len(users):,} test targets can be items that it was trained on; restore the histories, "
            "or give --allow_other_histories"
        )
    return f"not those of training: {number:,} of {len(users):,} targets can be items that the model was trained on"


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
        token_ids,
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
    check_base_model(metadata.base_model or "", metadata.checked_base_sha256, folder)
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
    device: torch.device | None = None,
    **moved: str | None,
) -> tuple[YesNoModel, RatingsDataset]:
    """Load a tuned Yes/No model and its ratings.

    Args:
        device: of weights in 4 bits, see `load_model`.
        moved: base_model and cf_model override the stored paths.

    Raises:
        InputError: something is missing, or the model knows the users and items of other ratings. TALLRec, which
            knows titles alone, opens with any.
    """
    dataset = open_ratings(data_path, name or metadata.dataset)
    if metadata.method != "tallrec":
        if metadata.ratings_sha256 != dataset.sha256():
            raise InputError(f"{folder}: knows the users and items of other ratings than those of {dataset.folder}")
        if metadata.items_sha256 not in (None, dataset.items_sha256()):
            check_same_titles(folder, metadata, dataset)
    return load_yes_no_model(folder, metadata.method, device=device, **moved), dataset


def check_same_titles(folder: Path, metadata: CheckpointMetadata, dataset: RatingsDataset) -> None:
    """Raise InputError if item.json has other items than the one that a model was trained with.

    A number stands for another item if its title is that of another item of the training. Other titles were edited: a
    line states their number.
    """
    known = {item: texts.get("title") for item, texts in metadata.items.items()}
    titles = {item: str(texts["title"]) for item, texts in dataset.items.items()}
    path, advice = dataset.folder / "item.json", "restore the file, or train the model again"
    if not known:  # a checkpoint of an earlier version
        raise InputError(
            f"{path}: are not the items that {folder} was trained with: one was added, left or has another title; "
            f"{advice}"
        )
    if unknown := next((item for item in titles if item not in known), None):
        raise InputError(f"{path}: item {unknown!r} is not among the items that {folder} was trained with; {advice}")
    if missing := next((item for item in known if item not in titles), None):
        raise InputError(f"{path}: has no item {missing!r}, one of those that {folder} was trained with; {advice}")
    edited = [item for item, title in known.items() if titles[item] != title]
    names = {*known.values()}
    if moved := next((item for item in edited if titles[item] in names), None):
        ours, theirs = (shorten(str(title), 60) for title in (titles[moved], known[moved]))
        raise InputError(f"{path}: item {moved!r} is {ours!r}, but {folder} was trained with {theirs!r}; {advice}")
    print_note(f"{path}: {len(edited):,} items have other titles than when {folder} was tuned")


def check_ratings(
    folder: Path, metadata: CheckpointMetadata, dataset: RatingsDataset, part: datasets.Dataset, allow_others: bool
) -> str:
    """Return how the test ratings `part` relate to those of training, a sentence for results and report.

    Raises:
        InputError: they can be ratings that the model was trained on, and `allow_others` is False.
    """
    is_known = metadata.ratings_sha256 in (None, dataset.sha256())
    number = dataset.num_trained(part) if is_known else len(part)
    if not number:
        return "those of training"
    if not allow_others:
        raise InputError(
            f"{dataset.folder}: {number:,} of {len(part):,} test ratings can be ratings that {folder} was trained on; "
            "restore the files, or give --allow_other_histories"
        )
    which = "those of training" if is_known else "not those of training"
    return f"{which}: {number:,} of {len(part):,} test ratings can be ratings that the model was trained on"


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
        prompt_id: number of the prompt template; None: one is drawn for each tree and epoch.
        cold_text_only: rows whose user or item training did not know get the prompt of titles alone.
    """
    templates, codes = yes_no_templates(metadata), None
    cold_template = PromptTemplate(**metadata.prompts["text"][0]) if cold_text_only else None
    fields = {
        field for template in (*templates, *([cold_template] if cold_template else ())) for field in template.fields
    }
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
        row_texts=rate_texts(dataset.parts["train"], rows, fields),
        cold_template=cold_template,
        draw=prompt_id is None,
        seed=seed,
        history_window=metadata.history_window or "sliding",
        rows_per_tree=metadata.rows_per_tree if model.supports_trees else 1,
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
