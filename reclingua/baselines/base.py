"""Baseline: the interface of all next-item baselines, and the ranking of items by their scores."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from reclingua.baselines.histories import Histories

Settings = Mapping[str, Any]


class Baseline(ABC):
    """A model that scores all items for a history; fitting it needs training histories alone.

    FIT_GRID and SCORE_GRID hold the values that are tried on valid, by name of the setting; a value of FIT_GRID needs
    another fit, one of SCORE_GRID does not. The first value of each is the default.

    Args:
        settings: values that replace defaults.
    """

    name: ClassVar[str]
    FIT_GRID: ClassVar[dict[str, tuple[float, ...]]] = {}
    SCORE_GRID: ClassVar[dict[str, tuple[float, ...]]] = {}

    def __init__(self, settings: Settings | None = None):
        defaults = {name: values[0] for name, values in (self.FIT_GRID | self.SCORE_GRID).items()}
        self.settings: dict[str, Any] = defaults | dict(settings or {})

    def reason_against(self, train: Histories) -> str:
        """Return why the model cannot be fitted to so much data; "" if it can."""
        return ""

    @abstractmethod
    def fit(self, train: Histories) -> Self:
        """Fit the model to the training histories and return it."""

    @abstractmethod
    def scores(self, histories: Histories) -> np.ndarray:
        """Return the scores of all items, float32 [histories, items]; equal scores are ranked by popularity."""


def target_ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the rank of each target from 1, int64 [rows]; 0 where it is excluded, its score being -inf.

    Args:
        scores: [rows, items]; of equal scores the smaller item number is first.
        targets: int64 [rows], item numbers.
    """
    of_target = scores[np.arange(len(targets)), targets][:, None]
    is_before = np.arange(scores.shape[1]) < targets[:, None]
    ranks = 1 + (scores > of_target).sum(1) + ((scores == of_target) & is_before).sum(1)
    return np.where(np.isneginf(of_target[:, 0]), 0, ranks)


def best_items(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the numbers of the best `k` items of each row, best first, int64 [rows, k or fewer].

    Equal scores are ordered by item number. -1 stands for items that are excluded, their score being -inf.
    """
    k = min(k, scores.shape[1])
    if k == 0:
        return np.zeros((len(scores), 0), np.int64)
    threshold = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    is_above, is_equal = scores > threshold, scores == threshold
    is_best = is_above | (is_equal & (is_equal.cumsum(1) <= k - is_above.sum(1, keepdims=True)))
    numbers = np.nonzero(is_best)[1].reshape(len(scores), k)
    values = np.take_along_axis(scores, numbers, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    numbers, values = np.take_along_axis(numbers, order, 1), np.take_along_axis(values, order, 1)
    return np.where(np.isneginf(values), -1, numbers)


def exclude(scores: np.ndarray, excluded: Histories) -> None:
    """Set the scores of each row's excluded items to -inf, in place."""
    scores[excluded.users, excluded.items] = -np.inf
