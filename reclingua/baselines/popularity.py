"""Popularity baseline: items ranked by their number of training interactions."""

from typing import Self

import numpy as np

from reclingua.baselines.base import Baseline
from reclingua.baselines.histories import Histories


class Popularity(Baseline):
    """Scores are the number of training interactions, the same for every history."""

    name = "popularity"

    def fit(self, train: Histories) -> Self:
        self.counts = np.bincount(train.items, minlength=train.num_items).astype(np.float32)
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        return np.tile(self.counts, (len(histories), 1))
