"""EASE baseline (Steck, 2019; arXiv 1905.03375): a linear item-to-item model in closed form."""

from typing import Self

import numpy as np

from reclingua.baselines.base import Baseline
from reclingua.baselines.histories import Histories
from reclingua.baselines.linear import invert, too_many_items


class EASE(Baseline):
    """B = argmin ||X - X B||^2 + l2 ||B||^2 with a diagonal of zeros, X the binary user-item matrix (section 3.1).

    With P = (X^T X + l2 I)^-1 the weights are B[i, j] = -P[i, j] / P[j, j]. An item of a history weighs
    exp(-decay x age), as recent items tell more of the next one; the paper weighs all alike (decay 0).
    """

    name = "ease"
    FIT_GRID = {"l2": (200.0, 50.0, 800.0)}
    SCORE_GRID = {"decay": (0.2, 0.0, 0.4)}

    def reason_against(self, train: Histories) -> str:
        return too_many_items(train.num_items)

    def fit(self, train: Histories) -> Self:
        users = train.matrix()
        weights = invert((users.T @ users).toarray(), self.settings["l2"])
        weights /= -weights.diagonal().copy()
        weights[np.diag_indices_from(weights)] = 0
        self.weights = weights
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        return histories.recency_matrix(self.settings["decay"]) @ self.weights
