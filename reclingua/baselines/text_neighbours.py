"""Text-neighbour baseline: the items whose texts are most like those of the history; it knows no interactions."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from reclingua.baselines.base import Baseline
from reclingua.baselines.histories import Histories

DECAY = 0.2  # of an item's weight with its age in the history


class TextNeighbours(Baseline):
    """Score of a candidate: sum over the history of exp(-DECAY x age) x cosine of the TF-IDF vectors of both texts.

    Args:
        texts: text of each item of the catalogue.
    """

    name = "text-neighbours"

    def __init__(self, texts: Sequence[str]):
        super().__init__({"decay": DECAY})
        vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, dtype=np.float32)
        # The last text keeps the vocabulary from being empty, and is no item.
        self.vectors = sparse.csr_array(vectorizer.fit_transform([*texts, "item"]))[: len(texts)]

    def fit(self, train: Histories) -> Self:
        return self  # texts are all it reads

    def scores(self, histories: Histories) -> np.ndarray:
        profiles = histories.recency_matrix(self.settings["decay"]) @ self.vectors
        return (profiles @ self.vectors.T).toarray()
