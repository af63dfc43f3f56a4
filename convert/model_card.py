"""Model cards of converted folders, and their upload to the hub on request."""

import argparse
import sys
from pathlib import Path

import httpx2
from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json
from reclingua.utils.metadata import (
    FILES,
    METADATA_FILE,
    CheckpointMetadata,
    default_results_file,
    measured_checkpoint,
)

CARD, RESULTS = "README.md", "results of test.py"
KINDS = {
    "delta": "These are delta weights, fine-tuned minus base weights; the base model is `{base}`. RecLingua adds them "
    "to the base and restores the fine-tuned model bit by bit:",
    "complete": "This is a complete model, fine-tuned from `{base}`. To evaluate it with RecLingua:",
    "adapter": "These are the weights that were trained on top of `{base}`, which is needed, too. To evaluate them "
    "with RecLingua (`--base_model` names a copy of the base{cf_model}):",
    "collaborative": "This is a collaborative model of ratings. To evaluate it with RecLingua:",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for publishing a folder to a parser."""
    group = parser.add_argument_group("publishing")
    group.add_argument(
        "--push_to_hub", "--hub-repo-id", "--hub_repo_id", metavar="REPO_ID",
        help="upload the folder to this repository, with the token of `hf auth login` or HF_TOKEN "
        "(default: no upload)",
    )  # fmt: skip
    group.add_argument(
        "--results_file", type=Path,
        help="results of test.py for the model card (default: the one below results/<dataset>/ that is of this model)",
    )  # fmt: skip


def validated_metrics(args: argparse.Namespace, tuned: Path) -> dict[str, float]:
    """Return the metrics of the model in `tuned`, {} if unknown, and validate the flags of `add_flags`.

    Scripts call it first, so that a wrong flag does not fail after the work.

    Raises:
        InputError: the repository name is invalid, no token exists, or the results file is none.
    """
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise InputError(f"--push_to_hub {args.push_to_hub}: is no valid repository name ({error})") from None
        if not get_token():
            raise InputError("--push_to_hub needs a token: hf auth login, or the environment variable HF_TOKEN")
    if args.results_file:
        return extract_metrics(read_json(args.results_file, RESULTS), args.results_file)
    if not (tuned / METADATA_FILE).exists():
        return {}
    file = find_results(tuned, CheckpointMetadata.load(tuned).dataset)
    return extract_metrics(read_json(file, RESULTS), file) if file else {}


def find_results(checkpoint: Path, dataset: str) -> Path | None:
    """Return a results file of the checkpoint below results/<dataset>/: the default one, else the first by name."""
    default = default_results_file(checkpoint, dataset)
    for file in [default, *sorted(default.parent.glob("*.json"))]:
        try:
            if file.exists() and measured_checkpoint(file) == checkpoint.resolve():
                return file
        except InputError:  # not a results file
            continue
    return None


def extract_metrics(results: dict, file: Path) -> dict[str, float]:
    """Return metric -> value from next-item or Yes/No results; InputError for other files."""
    metrics = results.get("mean_results") or results.get("test")
    if not isinstance(metrics, dict):
        raise InputError(f"{file}: should be results of test.py, with mean_results or test")
    metrics = {name: value for name, value in metrics.items() if "@" in name or name in ("auc", "uauc")}
    if wrong := next((name for name, value in metrics.items() if not isinstance(value, float | int | None)), None):
        raise InputError(f"{file}: {wrong} should be a number")
    return {name: value for name, value in metrics.items() if value is not None}


def write_card(
    folder: Path, kind: str, name: str | Path, base: str | None, metrics: dict[str, float], cf_model: str | None = None
) -> None:
    """Write the model card of `folder`: kind, metrics, usage.

    Args:
        kind: one of KINDS.
        name: path or repository name of the model.
        base: name of the base model; None: there is none.
        cf_model: name of the collaborative model that an adapter needs.

    Raises:
        OSError: the card cannot be written.
    """
    metadata = CheckpointMetadata.load(folder) if (folder / METADATA_FILE).exists() else None
    method, dataset = (metadata.method, metadata.dataset) if metadata else ("", "DATASET")
    name = Path(name).absolute().name
    task = {"task_type": "recommendation", "dataset_type": dataset, "dataset_name": dataset}
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if method in ("lcrec", "") else "reclingua",
        pipeline_tag="text-generation",
        tags=["recommendation", "reclingua", *filter(None, [method]), *(["delta-weights"] if kind == "delta" else [])],
        model_name=name,
        eval_results=[
            EvalResult(**task, metric_type=metric, metric_value=round(value, 4)) for metric, value in metrics.items()
        ]
        or None,
    )
    needed = f", `--cf_model` one of the collaborative model `{cf_model}`" if cf_model else ""
    commands = [f"python test.py --ckpt_path {'tuned' if kind == 'delta' else 'FOLDER'} --dataset {dataset}"]
    if kind == "delta":
        commands.insert(
            0, "python -m convert.merge_delta --base-model-path BASE --delta-path DELTA --target-model-path tuned"
        )
    lines = ["---", data.to_yaml(), "---", "", f"# {name}", "", KINDS[kind].format(base=base, cf_model=needed), ""]
    lines += ["```bash", *commands, "```"]
    if method == "lcrec":
        lines += ["", f"It generates semantic IDs of the dataset {dataset}; {describe_index(folder, dataset)}."]
    if metrics:
        lines += ["", f"Results on the test users of {dataset}:", "", "| metric | |", "|---|---|"]
        lines += [f"| {metric} | {value:.4f} |" for metric, value in metrics.items()]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_index(folder: Path, dataset: str) -> str:
    """Return which file has the semantic IDs of a next-item model; an old checkpoint does not hold them."""
    if (folder / FILES["index"]).exists():
        titles = f", `{FILES['items']}` their titles" if (folder / FILES["items"]).exists() else ""
        return f"`{FILES['index']}` has the semantic ID of each item{titles}"
    return f"evaluation needs the same file `{dataset}.index.json`"


def push(repo: str | None, folder: Path) -> None:
    """Upload a folder to the hub as repository `repo`, unless it is None; after an InputError the folder is kept."""
    if not repo:
        return
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        hub = HfApi()
        hub.create_repo(repo, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{folder.name} by RecLingua")
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(get_token() or "\n", "***")
        raise InputError(
            f"{repo}: upload to the hub failed ({reason}); {folder} is complete, retry with: hf upload {repo} {folder}"
        ) from None
    print(f"{folder} -> {hub.endpoint}/{repo}")
