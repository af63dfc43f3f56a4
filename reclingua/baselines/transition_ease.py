"""Transition EASE baseline: a ridge regression from the items before a place in a history to the items after it."""

from typing import Self

import numpy as np
from scipy import sparse

from reclingua.baselines.base import Baseline
from reclingua.baselines.histories import Histories
from reclingua.baselines.linear import solve, too_many_items

PAST, NEXT = 10, 3  # items before and after a place
DECAY = 0.3


class TransitionEASE(Baseline):
    """B = argmin ||F - P B||^2 + l2 ||B||^2, with a row of P and F for each place in a training history.

    P holds the PAST items before the place, the nearest first, F the NEXT items after it; both weigh exp(-DECAY x
    distance). A history's score weighs its latest PAST items in the same way. Unlike EASE, the model knows the order.
    """

    name = "transition-ease"
    FIT_GRID = {"l2": (300.0, 100.0, 1000.0)}

    def reason_against(self, train: Histories) -> str:
        return too_many_items(train.num_items)

    def fit(self, train: Histories) -> Self:
        size = train.num_items
        has_next = train.ages > 0  # a place is numbered by the item before it
        places = np.flatnonzero(has_next)
        starts = np.repeat(train.ends - train.lengths, train.lengths)

        def window(offsets: range, sign: int) -> sparse.csr_array:
            rows, columns, weights = [], [], []
            for distance, offset in enumerate(offsets):
                others = places + sign * offset
                is_same_user = (others >= starts[places]) & (others <= places + train.ages[places])
                rows.append(places[is_same_user])
                columns.append(train.items[others[is_same_user]])
                weights.append(np.full(is_same_user.sum(), np.exp(-DECAY * distance), np.float32))
            entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
            return sparse.csr_array(entries, shape=(len(train.items), size))

        past, following = window(range(PAST), -1), window(range(1, NEXT + 1), 1)
        self.weights = solve((past.T @ past).toarray(), (past.T @ following).toarray(), self.settings["l2"])
        return self

    def scores(self, histories: Histories) -> np.ndarray:
        weights = np.where(histories.ages < PAST, np.exp(-DECAY * histories.ages), 0)
        return histories.matrix(weights) @ self.weights
