"""Metrics of cold and of warm targets: those without any training interaction, and the others."""

from collections.abc import Mapping, Sequence

import numpy as np

from reclingua.datasets.interactions import InteractionDataset
from reclingua.metrics import metrics_of_ranks, rank_gains
from reclingua.reporting.console import print_rows


def count_candidates(
    dataset: InteractionDataset, histories: Sequence[Sequence[str]], targets: Sequence[str], excludes_seen: bool
) -> list[int]:
    """Return the number of candidates of each user; 0 where the target is none of them."""
    total = len(dataset.item_ids)
    return [
        (0 if target in history else total - len({*history})) if excludes_seen else total
        for history, target in zip(histories, targets, strict=True)
    ]


def random_metrics(num_candidates: np.ndarray, names: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Return the expected metrics of a random ranking, mean over users.

    Args:
        num_candidates: int64 [users], among which the target is; 0: the target is no candidate.
        names: pairs (metric, k), as `parse_metrics` returns them.
    """
    metrics = {}
    for name, k in names:
        gains = np.append(0, rank_gains(np.arange(1, k + 1), f"{name}@{k}").cumsum())  # of lists of 0 to k items
        expected = gains[np.minimum(num_candidates, k)] / np.maximum(num_candidates, 1)
        metrics[f"{name}@{k}"] = float(expected.mean())
    return metrics


def cold_item_metrics(
    details: Mapping, num_candidates: Sequence[int], names: Sequence[tuple[str, int]]
) -> dict[str, dict]:
    """Return {"warm": ..., "cold": ...}, each with `targets`, their number, and `rows`, metrics by name.

    The rows are a random ranking, the baselines, the model with its first prompt, and the fusions.

    Args:
        details: of `next_item_details`.
        num_candidates, names: see `random_metrics`.

    Returns:
        {} if there is no cold target.
    """
    is_cold = np.array(details["target_popularity"]) == 0
    ranks = {**details["baselines"], details["method"]: details["ranks"][0], **details["fused"]}
    parts: dict[str, dict] = {}
    for part, users in (("warm", ~is_cold), ("cold", is_cold)) if is_cold.any() else ():
        rows = {"random": random_metrics(np.array(num_candidates)[users], names)} if users.any() else {}
        rows |= {row: metrics_of_ranks(np.array(values)[users], [*names]) for row, values in ranks.items() if rows}
        parts[part] = {"targets": int(users.sum()), "rows": rows}
    return parts


def print_cold_items(parts: Mapping[str, Mapping]) -> None:
    """Print a table for warm and for cold targets."""
    for part, content in parts.items():
        print(f"\n{part} targets: {content['targets']:,}", end="")
        print(", without training interactions" if part == "cold" else "")
        if content["rows"]:
            print_rows(content["rows"])
