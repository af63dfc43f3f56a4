"""A model card for what the other scripts here make, and its way to the hub where the user asks for it."""

import argparse
import sys
from pathlib import Path

import httpx2
from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from convert.folders import read_metadata
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json
from reclingua.utils.metadata import METADATA_FILE

CARD, RESULTS = "README.md", "results of test.py"
KINDS = {
    "delta": "These are delta weights: what is to be added to `{base}` to get the tuned model. RecLingua adds them so "
    "that every weight is the tuned one to the last bit, and refuses another base:",
    "merged": "This is a whole model, tuned from `{base}`. RecLingua measures it:",
}
COMMANDS = {
    "delta": "python -m convert.merge_delta --base-model-path BASE --delta-path DELTA --target-model-path tuned\n",
    "merged": "",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What scripts that make a folder take to publish it."""
    group = parser.add_argument_group("publishing")
    group.add_argument(
        "--push_to_hub", "--hub-repo-id", "--hub_repo_id", metavar="REPO_ID",
        help="put the folder on the hub as this repository, with the token of `hf auth login` or HF_TOKEN (default: "
        "the network is not touched)",
    )  # fmt: skip
    group.add_argument(
        "--results_file", type=Path,
        help="results of test.py, whose metrics go into the model card (default: results/<dataset>/<method>.json if "
        "that is of this model)",
    )  # fmt: skip


def validated_metrics(args: argparse.Namespace, tuned: Path) -> dict[str, float]:
    """The metrics of the model in `tuned`, as far as they are known; InputError for flags that cannot be followed.

    To be called first: what is wrong with publishing should not be found out when the work is done.
    """
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise InputError(f"--push_to_hub {args.push_to_hub}: is no name of a repository ({error})") from None
        if not get_token():
            raise InputError("--push_to_hub needs a token: hf auth login, or the environment variable HF_TOKEN")
    if args.results_file:
        return metrics_of(read_json(args.results_file, RESULTS), args.results_file)
    record = read_metadata(tuned) if (tuned / METADATA_FILE).exists() else {}
    file = Path("results") / str(record.get("dataset")) / f"{record.get('method')}.json"
    if not file.exists():
        return {}
    results = read_json(file, RESULTS)
    arguments = results.get("arguments")
    measured = arguments.get("ckpt_path") if isinstance(arguments, dict) else None
    is_its = isinstance(measured, str) and Path(measured).resolve() == tuned.resolve()
    return metrics_of(results, file) if is_its else {}


def metrics_of(results: dict, file: Path) -> dict[str, float]:
    """Metric -> value, of a model that generates or that answers Yes or No; InputError for other files."""
    found = results.get("mean_results") or results.get("test")
    if not isinstance(found, dict):
        raise InputError(f"{file}: should be results of test.py, with mean_results or test")
    found = {name: value for name, value in found.items() if "@" in name or name in ("auc", "uauc")}
    if wrong := next((name for name, value in found.items() if not isinstance(value, float | int | None)), None):
        raise InputError(f"{file}: {wrong} should be a number")
    return {name: value for name, value in found.items() if value is not None}


def write_card(folder: Path, kind: str, name: str | Path, base: str, metrics: dict[str, float]) -> None:
    """Write the model card of `folder`: what it is, its metrics, how to use it.

    Args:
        kind: one of KINDS.
        name: of the model, a path or the name of a repository.
        base: name of the base model.

    Raises:
        OSError: as writing does.
    """
    record = read_metadata(folder) if (folder / METADATA_FILE).exists() else {}
    method, dataset = str(record.get("method", "")), str(record.get("dataset", "DATASET"))
    name = Path(name).absolute().name
    measured = {"task_type": "recommendation", "dataset_type": dataset, "dataset_name": dataset}
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if method in ("lcrec", "") else "reclingua",
        pipeline_tag="text-generation",
        tags=["recommendation", "reclingua", *filter(None, [method]), *(["delta-weights"] if kind == "delta" else [])],
        model_name=name,
        eval_results=[
            EvalResult(**measured, metric_type=metric, metric_value=round(value, 4))
            for metric, value in metrics.items()
        ]
        or None,
    )
    tested = f"python test.py --ckpt_path {'tuned' if kind == 'delta' else 'FOLDER'} --dataset {dataset}"
    lines = ["---", data.to_yaml(), "---", "", f"# {name}", "", KINDS[kind].format(base=base), ""]
    lines += ["```bash", COMMANDS[kind] + tested, "```"]
    if method == "lcrec":
        index = f"`{dataset}.index.json`"
        lines += ["", f"Its items are those of the dataset {dataset}, by the index it was tuned with ({index})."]
    if metrics:
        lines += ["", f"Measured on the test users of {dataset}:", "", "| metric | |", "|---|---|"]
        lines += [f"| {metric} | {value:.4f} |" for metric, value in metrics.items()]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def push(repo: str | None, folder: Path) -> None:
    """Put a folder on the hub as repository `repo`, if there is one; InputError if this fails, the folder stays."""
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
            f"{repo}: did not reach the hub ({reason}); {folder} is whole, try again with: hf upload {repo} {folder}"
        ) from None
    print(f"{folder} -> {hub.endpoint}/{repo}")
