"""What a test leaves for its report: of every user the place of the target, of every rating the score; checked.

results/D/lcrec.json has the figures, results/D/lcrec/evidence.json what they were made of. Runs are compared user by
user with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from reclingua.datasets.interactions import RecDataset
from reclingua.datasets.ratings import to_numpy
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

BASELINES = ("popularity", "co-occurrence")
# Lists as long as there are users or ratings; ranks have one a phrasing.
LISTS = {
    "search": {
        "users": "U", "targets": "U", "history_lengths": "i", "target_popularity": "i", "ranks": "i",
        **dict.fromkeys(BASELINES, "i"),
    },
    "preference": {"users": "i", "items": "i", "labels": "i", "warm": "i", "scores": "f"},
}  # fmt: skip
OTHERS = {
    "search": {"dataset", "method", "curves", "phrasings", "index"},
    "preference": {"dataset", "method", "curves", "phrasings"},
}
RESULTS = {
    "search": ("mean_results", "baselines", "num_beams", "test_prompt_ids", "all_prompt_results", "arguments"),
    "preference": ("test", "warm", "cold", "arguments"),
}


@dataclass(frozen=True)
class Run:
    """A results file of test.py and its evidence, the lists of LISTS as numpy arrays."""

    file: Path
    results: dict
    evidence: dict

    @property
    def kind(self) -> str:
        return self.evidence["kind"]

    @property
    def method(self) -> str:
        return self.evidence["method"]


def folder_of(results_file: Path) -> Path:
    """Where evidence and report of a results file are: results/D/lcrec.json -> results/D/lcrec/."""
    if results_file.suffix:
        return results_file.with_suffix("")
    return results_file.with_name(f"{results_file.name}-report")


def next_item_details(
    dataset: RecDataset,
    method: str,
    users: Sequence[str],
    histories: Sequence[list[str]],
    targets: Sequence[str],
    lists: Mapping[int, list[list[str]]],
    baselines: Mapping[str, list[list[str]]],
    popularity: Mapping[str, int],
) -> dict:
    """Evidence of a search: places of the targets from 1, 0 where a list does not hold it.

    Args:
        lists: phrasing -> for each user the items, best first; `baselines` the same by their names.
        popularity: item -> interactions in training.
    """
    return {
        "kind": "search",
        "dataset": dataset.name,
        "method": method,
        "users": list(users),
        "targets": list(targets),
        "history_lengths": [len(history) for history in histories],
        "target_popularity": [popularity[target] for target in targets],
        "ranks": [_places(each, targets) for each in lists.values()],
        **{name: _places(each, targets) for name, each in baselines.items()},
    }


def _places(lists: list[list[str]], targets: Sequence[str]) -> list[int]:
    return [ranked.index(target) + 1 if target in ranked else 0 for ranked, target in zip(lists, targets, strict=True)]


def yes_no_details(dataset: str, method: str, part: Dataset, scores: np.ndarray) -> dict:
    """Evidence of rows of a preference dataset; `scores` [rows] are log-odds, kept to the last bit."""
    columns = {"users": "uid", "items": "iid", "labels": "label", "warm": "not_cold"}
    return {
        "kind": "preference",
        "dataset": dataset,
        "method": method,
        **{name: to_numpy(part, of).tolist() for name, of in columns.items()},
        "scores": scores.tolist(),
    }


def training_curves(ckpt_path: Path) -> dict | None:
    """What was logged in training, from <ckpt>/run.json; None where a checkpoint has no such file.

    {"over": "step" or "epoch", "loss": [[at, value], ...], "valid": {name: [[at, value], ...]}}

    Raises:
        InputError: the file holds something else.
    """
    path = ckpt_path / "run.json"
    if not path.exists():
        return None
    run = read_json(path, "the log of a training run")
    lines = run.get("log", run.get("curve"))
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path}: should have a log of training, a list of objects; take the file away or repair it")
    over = "step" if any("step" in line for line in lines) else "epoch"
    curves = {"over": over, "loss": [], "valid": {}}
    for line in lines:
        for key, value in line.items():
            name = key.removeprefix("eval_")
            is_number = (
                isinstance(value, float | int) and math.isfinite(value) and isinstance(line.get(over), int | float)
            )
            if not is_number or name.endswith(("runtime", "per_second")):
                continue
            if key == "loss":
                curves["loss"].append([line[over], value])
            elif key != name or name in ("auc", "uauc"):
                curves["valid"].setdefault(name, []).append([line[over], value])
    return curves


def open_run(file: Path) -> Run:
    """A results file with its evidence; InputError unless both are there and whole."""
    results = read_json(file, "results of test.py")
    path = folder_of(file) / "evidence.json"
    if "test_prompt_ids" not in results and "test" not in results:
        raise InputError(f"{file}: should be results of test.py, with mean_results or test")
    if not path.exists():
        raise InputError(f"{path}: no such file; run test.py again, which writes it beside {file.name}")
    evidence = read_json(path, "what test.py found for every user")
    if (kind := str(evidence.get("kind"))) not in LISTS or not OTHERS[kind] <= evidence.keys():
        raise InputError(f"{path}: was not written by this version of test.py; run it again")
    if missing := next((key for key in RESULTS[kind] if key not in results), None):
        raise InputError(f"{file}: has no {missing}; it should be results of test.py")
    arrays = {name: _array(evidence.get(name), sort, path, name) for name, sort in LISTS[kind].items()}
    if len({array.shape[-1] for array in arrays.values()}) > 1:
        raise InputError(f"{path}: its lists differ in length; run test.py again")
    texts, asked = evidence["phrasings"], results.get("test_prompt_ids", [])
    if not isinstance(texts, list) or [type(text) for text in texts] != [str] * len(asked):
        raise InputError(f"{path}: phrasings is not what test.py writes; run it again")
    return Run(file, results, evidence | arrays)


def _array(values: object, sort: str, path: Path, name: str) -> np.ndarray:
    """A list of texts (U), whole numbers (i) or numbers (f) as an array; ranks are such lists, one a phrasing."""
    try:
        array = np.array(values)
        array = array.astype(np.float64) if sort == "f" and array.dtype.kind == "i" else array
    except ValueError:  # rows of several lengths
        array = np.array(None)
    if array.dtype.kind != sort or array.ndim != (2 if name == "ranks" else 1) or not array.size:
        raise InputError(f"{path}: {name} is not what test.py writes; run it again")
    return array
