"""Score rows of ratings with a collaborative model, and compute AUC and UAUC: all, warm and cold rows."""

import math

import numpy as np
import torch
from datasets import Dataset

from reclingua.datasets.ratings import RatingsDataset, liked_history, to_numpy
from reclingua.metrics.roc import auc, uauc
from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.utils.errors import InputError


def model_inputs(part: Dataset, model: CollaborativeModel) -> dict[str, torch.Tensor]:
    """Return the tensors that `model.forward` takes for all rows of a part, on the model's device."""
    tensors = {
        "users": torch.from_numpy(to_numpy(part, "uid").astype(np.int64)),
        "items": torch.from_numpy(to_numpy(part, "iid").astype(np.int64)),
        "labels": torch.from_numpy(to_numpy(part, "label").astype(np.float32)),
    }
    if model.history_length:
        tensors["histories"] = torch.from_numpy(liked_history(part, model.history_length))
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


@torch.no_grad()
def score(model: CollaborativeModel, inputs: dict[str, torch.Tensor], batch_size: int = 8192) -> np.ndarray:
    """Return logits, float32 [rows], of `model_inputs`, with the model in evaluation mode."""
    was_training = model.training
    model.eval()
    inputs = {name: tensor.split(batch_size) for name, tensor in inputs.items() if name != "labels"}
    scores = [model(**dict(zip(inputs, batch, strict=True))).logits for batch in zip(*inputs.values(), strict=True)]
    model.train(was_training)
    return torch.cat(scores).float().cpu().numpy()


def score_rows(model: CollaborativeModel, part: Dataset) -> np.ndarray:
    """Return the log-odds of rows of ratings, float64 [rows]: their order is that of the scores, ties included."""
    return model.log_odds(score(model, model_inputs(part, model)).astype(np.float64))


def auc_metrics(part: Dataset, scores: np.ndarray) -> dict[str, dict]:
    """Return {"test": ..., "warm": ..., "cold": ...}, each with auc, uauc, users_counted, users_left_out, samples.

    A warm row is one whose user and item both occur in train. A metric that is not defined (no rows, or labels of one
    kind only) is None.
    """
    warm = to_numpy(part, "not_cold") == 1
    users, labels = to_numpy(part, "uid"), to_numpy(part, "label")
    results: dict[str, dict] = {}
    for name, rows in (("test", np.ones_like(warm)), ("warm", warm), ("cold", ~warm)):
        metrics: dict[str, float] = {"auc": math.nan, "uauc": math.nan, "users_counted": 0, "users_left_out": 0}
        if rows.any():
            metrics = {"auc": auc(labels[rows], scores[rows]), **uauc(users[rows], labels[rows], scores[rows])}
        defined = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        results[name] = {**defined, "samples": int(rows.sum())}
    return results


def valid_metrics(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return {"auc": ..., "uauc": ...} of rows, NaN where a metric is not defined."""
    return {"auc": auc(labels, scores), "uauc": uauc(users, labels, scores)["uauc"]}


def check_same_dataset(model: CollaborativeModel, dataset: RatingsDataset) -> None:
    """Raise InputError unless the model was trained on `dataset` and has a row for each of its users and items."""
    config = model.config
    for kind, size, needed in (
        ("user", config.num_users, dataset.num_users),
        ("item", config.num_items, dataset.num_items),
    ):
        if needed > size:
            raise InputError(
                f"{config.name_or_path}: knows {kind}s up to {size - 1}, {dataset.folder} has {kind} {needed - 1}; "
                "train it on this dataset with python pretrain.py"
            )
    if config.dataset_sha256 != dataset.sha256():
        raise InputError(
            f"{config.name_or_path}: was trained on other ratings ({config.dataset}) than those of {dataset.folder}; "
            "train it on this dataset with python pretrain.py"
        )


def format_metric(value: float | None) -> str:
    """Return a metric with four digits, "-" for one that is not defined."""
    return "-" if value is None else f"{value:.4f}"


def print_table(rows: dict[str, dict[str, dict]]) -> None:
    """Print the results of `auc_metrics`: a line for each model, AUC and UAUC of all, warm and cold rows."""
    width = max(map(len, rows))
    parts = {"test": "all", "warm": "warm", "cold": "cold"}
    print("\n" + " " * width + "".join(f"{f'AUC {label}':>11}{f'UAUC {label}':>11}" for label in parts.values()))
    for name, results in rows.items():
        values = [results[part][key] for part in parts for key in ("auc", "uauc")]
        print(f"{name:<{width}}" + "".join(f"{format_metric(value):>11}" for value in values))
