"""Histories of many users as flat arrays of item numbers, from which the baselines build their sparse matrices."""

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import chain

import numpy as np
from scipy import sparse

from reclingua.datasets.interactions import InteractionDataset
from reclingua.utils.errors import InputError


class Histories:
    """Histories of users, one after another, each oldest first.

    Args:
        items: int [interactions], item numbers.
        lengths: int [users].
        num_items: items of the catalogue, the columns of all matrices.
    """

    def __init__(self, items: np.ndarray, lengths: np.ndarray, num_items: int):
        self.items, self.lengths, self.num_items = items, lengths, num_items
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice) -> "Histories":
        """Return the histories of consecutive users."""
        start, stop, _ = rows.indices(len(self))
        first = self.ends[start] - self.lengths[start] if start < stop else 0
        last = self.ends[stop - 1] if start < stop else 0
        return Histories(self.items[first:last], self.lengths[start:stop], self.num_items)

    @cached_property
    def users(self) -> np.ndarray:
        """Row of the user of each interaction, int64 [interactions]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def ages(self) -> np.ndarray:
        """Number of later interactions of the same user, int64 [interactions]; 0 is the latest."""
        return np.repeat(self.ends, self.lengths) - 1 - np.arange(len(self.items))

    def matrix(self, weights: np.ndarray | None = None) -> sparse.csr_array:
        """Return float32 [users, items] of weights [interactions], summed over repeats; None: 1 for every item."""
        values = np.ones(len(self.items), np.float32) if weights is None else weights.astype(np.float32)
        indptr = np.concatenate([[0], self.ends])
        matrix = sparse.csr_array((values, self.items.copy(), indptr), shape=(len(self), self.num_items))
        matrix.sum_duplicates()
        if weights is None:
            matrix.data[:] = 1
        return matrix

    def recency_matrix(self, decay: float) -> sparse.csr_array:
        """Return float32 [users, items], exp(-decay x age) of each item, summed over repeats."""
        return self.matrix(np.exp(-decay * self.ages))

    def pairs(self, distance: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the items (earlier, later) of all pairs of one user that are `distance` places apart, int [pairs]."""
        is_earlier = self.ages >= distance
        return self.items[is_earlier], self.items[np.flatnonzero(is_earlier) + distance]


class Catalogue:
    """Numbers of the items of a dataset, the most popular first, so that a stable sort breaks ties by popularity.

    Items of equal popularity keep their order in `dataset.item_ids`. Popularity counts training interactions.

    Args:
        dataset: only its training interactions are used.

    Attributes:
        items: item ids by number.
        counts: int64 [items], training interactions of each.
        train: the training histories.
    """

    def __init__(self, dataset: InteractionDataset):
        ids = dataset.item_ids
        self.name = dataset.name
        self._numbers = {item: number for number, item in enumerate(ids)}
        histories = [dataset.train_history(user) for user in dataset.histories]
        flat = self.encode(histories)
        counts = np.bincount(flat.items, minlength=len(ids))
        order = np.argsort(-counts, kind="stable")
        self.items = [ids[number] for number in order]
        self.counts = counts[order]
        self._numbers = {item: number for number, item in enumerate(self.items)}
        rank = np.empty(len(ids), np.int64)
        rank[order] = np.arange(len(ids))
        self.train = Histories(rank[flat.items], flat.lengths, len(ids))

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, item: str) -> int:
        """Return the number of an item; InputError if the dataset does not have it."""
        if item not in self._numbers:
            raise InputError(f"item {item!r} is not in {self.name}")
        return self._numbers[item]

    def encode(self, histories: Sequence[Collection[str]]) -> Histories:
        """Return histories of item ids, oldest first, as numbers; InputError for an item the dataset does not have."""
        lengths = np.fromiter(map(len, histories), np.int64, len(histories))
        return Histories(self.encode_items(chain.from_iterable(histories)), lengths, len(self))

    def encode_items(self, items: Iterable[str]) -> np.ndarray:
        """Return the numbers of items, int64 [items]; InputError for one that the dataset does not have."""
        return np.fromiter(map(self.number, items), np.int64)
