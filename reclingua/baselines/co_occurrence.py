"""Co-occurrence baseline: items that followed the user's latest items in other histories."""

from typing import Self

import numpy as np
from scipy import sparse

from reclingua.baselines.base import Baseline
from reclingua.baselines.histories import Histories

WINDOW = 3  # largest distance of two items that count as co-occurring
RECENT = 5  # number of a user's latest items that vote


class CoOccurrence(Baseline):
    """Recommender by first-order co-occurrence: candidates followed the user's latest items in other histories.

    A training pair (earlier, later) at most WINDOW places apart weighs 1 / distance, summed over all histories:

        weight(a -> c) = sum over pairs (a, c) of 1 / distance
        score(c)       = sum over the RECENT latest items a of weight(a -> c) / recency rank of a / sqrt(count(c))
    """

    name = "co-occurrence"

    def fit(self, train: Histories) -> Self:
        size = train.num_items
        followers = sparse.csr_array((size, size))
        for distance in range(1, WINDOW + 1):
            earlier, later = train.pairs(distance)
            weights = np.full(len(earlier), 1 / distance)
            followers += sparse.csr_array((weights, (earlier, later)), shape=(size, size))
        counts = np.bincount(train.items, minlength=size)
        self.followers = followers @ sparse.diags_array(1 / np.sqrt(np.maximum(counts, 1)))
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        weights = np.where(histories.ages < RECENT, 1 / (histories.ages + 1), 0)
        votes = histories.matrix(weights)
        votes.eliminate_zeros()
        # float64 until here, so that equal sums in another order stay equal
        return (votes.astype(np.float64) @ self.followers).toarray().astype(np.float32)
