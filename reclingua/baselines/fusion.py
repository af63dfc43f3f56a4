"""Fusion of several sources of scores on the union of their best items, with weights chosen on valid."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEPTH = 50  # best items of a baseline that are candidates
RANK_OFFSET = 10  # of reciprocal rank fusion: 1 / (RANK_OFFSET + rank)
METHODS = ("scores", "ranks")
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a source, relative to those before it


@dataclass(frozen=True)
class Candidates:
    """The items that are ranked for each history, and the score of each source.

    Args:
        numbers: int64 [histories, width], item numbers in ascending order, -1 for none.
        scores: float32 [sources, histories, width]; where there is no candidate the value has no meaning.
    """

    numbers: np.ndarray
    scores: np.ndarray

    @property
    def exists(self) -> np.ndarray:
        """Whether there is a candidate, bool [histories, width]."""
        return self.numbers >= 0


def unite(lists: Sequence[np.ndarray]) -> np.ndarray:
    """Return the union of item numbers of each row, int64 [rows, width], ascending, -1 for none at the end.

    Args:
        lists: int64 [rows, any] each, -1 for none.
    """
    numbers = np.sort(np.concatenate(lists, axis=1), axis=1)
    is_repeated = np.zeros(numbers.shape, bool)
    is_repeated[:, 1:] = numbers[:, 1:] == numbers[:, :-1]
    last = np.iinfo(np.int64).max
    numbers = np.sort(np.where(is_repeated | (numbers < 0), last, numbers), axis=1)
    width = int((numbers < last).sum(1).max(initial=0))
    return np.where(numbers[:, :width] < last, numbers[:, :width], -1)
