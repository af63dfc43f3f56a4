"""Details of a test for its report: the rank of each user's target, or the score of each rating.

results/D/lcrec.json contains the metrics, results/D/lcrec/details.json the values that they are computed from. Reports
take their intervals from the details, and runs are compared by them user by user.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from reclingua.datasets.interactions import InteractionDataset
from reclingua.datasets.ratings import to_numpy
from reclingua.utils.errors import InputError
from reclingua.utils.files import check_outputs, output_file, read_json
from reclingua.utils.metadata import check_results_file

DETAILS_FILE = "details.json"
PAGE_FILE = "report.html"
# Columns of the details and their numpy kinds: one value for each user or rating; `ranks` has such a list per prompt.
COLUMNS = {
    "next_item": {"users": "U", "targets": "U", "history_lengths": "i", "target_popularity": "i", "ranks": "i"},
    "yes_no": {"users": "i", "items": "i", "labels": "i", "warm": "i", "scores": "f"},
}
# Further rows of the results, by name: the rank of each target or the score of each rating.
ROWS = ("baselines", "fused")
ROW_KINDS = {"next_item": "i", "yes_no": "f"}
REQUIRED_DETAILS = {
    "next_item": {"dataset", "method", "curves", "prompts", "index", "worth", *ROWS},
    "yes_no": {"dataset", "method", "curves", "prompts", "worth", *ROWS},
}
REQUIRED_RESULTS = {
    "next_item": ("mean_results", *ROWS, "num_beams", "test_prompt_ids", "all_prompt_results", "arguments"),
    "yes_no": ("test", "warm", "cold", *ROWS, "arguments"),
}


@dataclass(frozen=True)
class Run:
    """Results file of test.py with its details, whose COLUMNS are numpy arrays."""

    file: Path
    results: dict
    details: dict

    @property
    def kind(self) -> str:
        """next_item or yes_no."""
        return self.details["kind"]

    @property
    def method(self) -> str:
        return self.details["method"]


def relation_note(run: Run, key: str) -> str:
    """Return a sentence on test data ("histories" or "ratings") that the model can have been trained on, or ""."""
    relation = run.results.get(key, "those of training")
    return "" if relation == "those of training" else f" The {key} are {relation}."


def report_folder(results_file: Path) -> Path:
    """Return the folder of details and report: results/D/lcrec.json -> results/D/lcrec/."""
    if results_file.suffix:
        return results_file.with_suffix("")
    return results_file.with_name(f"{results_file.name}-report")


def check_predictions_file(path: Path) -> None:
    """Raise InputError if a file exists there that holds no predictions, such as a file of a dataset."""
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with path.open(encoding="utf-8") as file:
            line = json.loads(file.readline(2**24))
    except (OSError, ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or not {"user", "prompt"} <= line.keys():
        raise InputError(f"{path}: exists and holds no predictions; name another --predictions_file")


def check_result_files(results_file: Path, predictions_file: Path | None, inputs: Mapping[str, Path | None]) -> None:
    """Raise InputError, before a test begins, if a file that it will write is another one or cannot be written.

    Args:
        inputs: what the test reads, by flag.
    """
    outputs = {"--results_file": results_file, "--predictions_file": predictions_file}
    for file in filter(None, outputs.values()):
        output_file(file)
    outputs |= {f"{name} of the report": report_folder(results_file) / name for name in (DETAILS_FILE, PAGE_FILE)}
    check_outputs(outputs, inputs)
    check_results_file(results_file)
    if predictions_file:
        check_predictions_file(predictions_file)


def next_item_details(
    dataset: InteractionDataset,
    method: str,
    users: Sequence[str],
    histories: Sequence[list[str]],
    targets: Sequence[str],
    ranked_lists: Mapping[int, list[list[str]]],
    popularity: Mapping[str, int],
    rows: Mapping[str, Mapping[str, np.ndarray]],
) -> dict:
    """Return the details of a next-item test. Ranks count from 1; 0 means that the list does not contain the target.

    Args:
        ranked_lists: prompt id -> for each user the items, best first.
        popularity: item -> interactions in training.
        rows: "baselines" and "fused" -> name -> ranks of the targets, int [users].
    """
    return {
        "kind": "next_item",
        "dataset": dataset.name,
        "method": method,
        "users": list(users),
        "targets": list(targets),
        "history_lengths": [len(history) for history in histories],
        "target_popularity": [popularity[target] for target in targets],
        "ranks": [_target_ranks(lists, targets) for lists in ranked_lists.values()],
        **_to_lists(rows),
    }


def _to_lists(rows: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, list]]:
    return {part: {name: values.tolist() for name, values in rows.get(part, {}).items()} for part in ROWS}


def _target_ranks(lists: list[list[str]], targets: Sequence[str]) -> list[int]:
    return [ranked.index(target) + 1 if target in ranked else 0 for ranked, target in zip(lists, targets, strict=True)]


def yes_no_details(
    dataset: str, method: str, part: Dataset, scores: np.ndarray, rows: Mapping[str, Mapping[str, np.ndarray]]
) -> dict:
    """Return the details of a Yes/No test: rows of a ratings dataset with their log-odds `scores` [rows], exact.

    Args:
        rows: "baselines" and "fused" -> name -> scores, float [rows].
    """
    columns = {"users": "uid", "items": "iid", "labels": "label", "warm": "not_cold"}
    return {
        "kind": "yes_no",
        "dataset": dataset,
        "method": method,
        **{name: to_numpy(part, column).tolist() for name, column in columns.items()},
        "scores": scores.tolist(),
        **_to_lists(rows),
    }


def training_curves(ckpt_path: Path) -> dict | None:
    """Read the training curves of <ckpt>/run.json; None if there is no such file, or a broken one, which is printed.

    Returns:
        {"over": "step" or "epoch", "loss": [[step, value], ...], "valid": {metric: [[step, value], ...]}}
    """
    path = ckpt_path / "run.json"
    if not path.exists():
        return None
    try:
        run = read_json(path, "the log of a training run")
    except InputError as error:  # the file has no part in the test
        print(f"the report has no training curves: {error}")
        return None
    entries = run.get("log", run.get("curve"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        print(f"the report has no training curves: {path}: has no training log, a list of objects")
        return None
    over = "step" if any("step" in entry for entry in entries) else "epoch"
    loss: list[list[float]] = []
    valid: dict[str, list[list[float]]] = {}
    for entry in entries:
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            is_number = (
                isinstance(value, float | int) and math.isfinite(value) and isinstance(entry.get(over), int | float)
            )
            if not is_number or name.endswith(("runtime", "per_second")):
                continue
            if key == "loss":
                loss.append([entry[over], value])
            elif key != name or name in ("auc", "uauc"):
                valid.setdefault(name, []).append([entry[over], value])
    return {"over": over, "loss": loss, "valid": valid}


def load_run(file: Path) -> Run:
    """Load a results file with its details; InputError unless both exist and are valid."""
    results = read_json(file, "results of test.py")
    path = report_folder(file) / DETAILS_FILE
    if "test_prompt_ids" not in results and "test" not in results:
        raise InputError(f"{file}: has neither mean_results nor test; name a results file of test.py")
    if not path.exists():
        raise InputError(f"{path}: no such file; run test.py again, which writes it with {file.name}")
    details = read_json(path, "the per-user details of a test")
    if (kind := str(details.get("kind"))) not in COLUMNS or not REQUIRED_DETAILS[kind] <= details.keys():
        raise InputError(f"{path}: was not written by this version of test.py; run it again")
    if missing := next((key for key in REQUIRED_RESULTS[kind] if key not in results), None):
        raise InputError(f"{file}: has no {missing}; name a results file of test.py")
    arrays = {name: _to_array(details.get(name), dtype, path, name) for name, dtype in COLUMNS[kind].items()}
    rows = {part: _to_arrays(details[part], ROW_KINDS[kind], path, part) for part in ROWS}
    all_arrays = [*arrays.values(), *(array for part in rows.values() for array in part.values())]
    if len({array.shape[-1] for array in all_arrays}) > 1:
        raise InputError(f"{path}: its lists differ in length; run test.py again")
    prompts, prompt_ids = details["prompts"], results.get("test_prompt_ids", [])
    if not isinstance(prompts, list) or [type(prompt) for prompt in prompts] != [str] * len(prompt_ids):
        raise InputError(f"{path}: prompts is not a list of {len(prompt_ids)} texts; run test.py again")
    return Run(file, results, details | arrays | rows)


def _to_arrays(values: Any, dtype: str, path: Path, name: str) -> dict[str, np.ndarray]:
    if not isinstance(values, dict):
        raise InputError(f"{path}: {name} has values of a wrong type or shape; run test.py again")
    return {row: _to_array(numbers, dtype, path, f"{name}: {row}") for row, numbers in values.items()}


def _to_array(values: Any, dtype: str, path: Path, name: str) -> np.ndarray:
    """Return a list of texts (U), integers (i) or floats (f) as an array [rows]; ranks as [prompts, rows]."""
    try:
        array = np.array(values)
        array = array.astype(np.float64) if dtype == "f" and array.dtype.kind == "i" else array
    except ValueError:  # rows of several lengths
        array = np.array(None)
    if array.dtype.kind != dtype or array.ndim != (2 if name == "ranks" else 1) or not array.size:
        raise InputError(f"{path}: {name} has values of a wrong type or shape; run test.py again")
    return array
