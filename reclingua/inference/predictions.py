"""Prediction files of a test: JSON lines from which every metric can be recomputed."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from reclingua.datasets.interactions import InteractionDataset
from reclingua.datasets.ratings import to_numpy
from reclingua.decoding.beam_search import ScoredItem
from reclingua.utils.files import atomic_write


def write_rankings(
    path: Path,
    dataset: InteractionDataset,
    users: list[str],
    targets: Sequence[str],
    rankings: dict[int, list[list[ScoredItem]]],
) -> None:
    """Write a line for each user and prompt: user, prompt, target, items (best first), indices, scores."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prompt_id, ranking in rankings.items():
            for user, target, ranked in zip(users, targets, ranking, strict=True):
                items = [scored.item for scored in ranked]
                line = {"user": user, "prompt": prompt_id, "target": target, "items": items}
                line["indices"] = ["".join(dataset.index[item]) for item in items]
                line["scores"] = [round(scored.score, 6) for scored in ranked]
                file.write(json.dumps(line) + "\n")


def write_scores(path: Path, part: Dataset, scores: dict[int | None, np.ndarray]) -> None:
    """Write a line for each rating and prompt: user, item, label, prompt, score."""
    columns = [to_numpy(part, name).tolist() for name in ("uid", "iid", "label")]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prompt_id, values in scores.items():
            for user, item, label, score in zip(*columns, values.tolist(), strict=True):
                line = {"user": user, "item": item, "label": label, "prompt": prompt_id, "score": score}
                file.write(json.dumps(line) + "\n")
