"""Item-kNN baseline: the items most similar to those of the history, the latest ones most."""

from typing import Self

import numpy as np
from scipy import sparse

from reclingua.baselines.base import Baseline
from reclingua.baselines.histories import Histories

ROWS = 512  # of the similarity matrix that are dense at a time


class ItemKNN(Baseline):
    """Score of a candidate: sum over the history of exp(-decay x age) x similarity to the candidate.

    The similarity is the cosine of the two items' columns in the user-item matrix (Sarwar et al., 2001), its
    denominator enlarged by `shrink`; of each item only the `neighbours` most similar ones keep it.
    """

    name = "item-knn"
    FIT_GRID = {"neighbours": (100, 50), "shrink": (10, 0)}
    SCORE_GRID = {"decay": (0.4, 0.2, 0.8)}

    def fit(self, train: Histories) -> Self:
        users = train.matrix()
        norms = np.sqrt(users.sum(0))
        shared = (users.T @ users).tocsr()
        k = min(int(self.settings["neighbours"]), train.num_items)
        kept = []
        for start in range(0, train.num_items, ROWS):
            block = shared[start : start + ROWS].toarray()
            block /= np.maximum(np.outer(norms[start : start + ROWS], norms) + self.settings["shrink"], 1e-6)
            block[np.arange(len(block)), start + np.arange(len(block))] = 0
            threshold = np.partition(block, -k, axis=1)[:, -k:].min(1, keepdims=True)
            kept.append(sparse.csr_array(np.where(block >= threshold, block, 0)))
        self.similarity = sparse.vstack(kept, format="csr")
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        return (histories.recency_matrix(self.settings["decay"]) @ self.similarity).toarray()
