"""Metrics as local `evaluate` modules, loaded from this folder without network access."""

from pathlib import Path

import evaluate
import numpy as np

from reclingua.utils.errors import InputError

FOLDER = Path(__file__).parent
RANKING = ("hit", "ndcg")


def parse_metrics(names: str) -> list[tuple[str, int]]:
    """Parse "hit@1,ndcg@10" into [("hit", 1), ("ndcg", 10)]; InputError for anything else."""
    parsed = []
    for name in names.split(","):
        metric, _, k = name.strip().lower().partition("@")
        if metric not in RANKING or not k.isdecimal() or int(k) < 1:
            raise InputError(
                f"--metrics {name.strip()!r}: should be hit@k or ndcg@k with k from 1, separated by commas"
            )
        parsed.append((metric, int(k)))
    return parsed


def load_metric(name: str) -> evaluate.Metric:
    """Load the `evaluate` module in folder metrics/`name`: hit, ndcg, auc or uauc."""
    return evaluate.load(str(FOLDER / name))


def ranking_metrics(
    predictions: list[list[str]], references: list[str], names: list[tuple[str, int]]
) -> dict[str, float]:
    """Compute all named ranking metrics: {"hit@10": 0.1, ...}.

    Args:
        predictions: ranked items of each sample, best first.
        references: target item of each sample.
        names: pairs (metric, k), as `parse_metrics` returns them.
    """
    results: dict[str, float] = {}
    for metric in sorted({metric for metric, _ in names}):
        cutoffs = [k for name, k in names if name == metric]
        values = load_metric(metric).compute(predictions=predictions, references=references, k=cutoffs)
        assert values is not None  # None on other ranks of a distributed `evaluate` only
        results |= values
    return {f"{metric}@{k}": float(results[f"{metric}@{k}"]) for metric, k in names}


def rank_gains(ranks: np.ndarray, name: str) -> np.ndarray:
    """Return a metric ("hit@10", "ndcg@10") of each rank, float64 of any shape; its mean is the metric.

    Args:
        ranks: int, of targets in their lists from 1; 0 = not in the list.
    """
    ((metric, k),) = parse_metrics(name)
    is_hit = (ranks > 0) & (ranks <= k)
    return is_hit.astype(np.float64) if metric == "hit" else is_hit / np.log2(np.maximum(ranks, 1) + 1)


def metrics_of_ranks(ranks: np.ndarray, names: list[tuple[str, int]]) -> dict[str, float]:
    """Return the named metrics, as `ranking_metrics` does, from the ranks of the targets."""
    return {name: float(rank_gains(ranks, name).mean()) for name in (f"{metric}@{k}" for metric, k in names)}
