"""Rows of recommend.py: the lists of many users, the neighbours of items, and the scores of pairs."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from reclingua.datasets.interactions import InteractionDataset
from reclingua.datasets.ratings import RatingsDataset, make_ratings, to_numpy
from reclingua.decoding.beam_search import ScoredItem
from reclingua.inference.fusion import FusedRecommender
from reclingua.inference.rating_fusion import FusedScorer
from reclingua.inference.recommender import Recommender
from reclingua.inference.request_files import Pair, User
from reclingua.inference.scorer import Scorer

DIGITS = 6  # of the scores in lists, as in the predictions file of test.py
MODEL, POPULARITY = "model", "popularity"  # sources of a row


class UserLists:
    """The best items of users, by a model or its fusion; by popularity for a user without any known item.

    Args:
        recommender: restricted to the items that are recommended.
        fused: ranks in its place.
        of_items: the users are items, whose lists are their neighbours.
        options: `exclude_seen` and `batch_size`, and without a fusion `num_beams`, of `recommend`.
    """

    def __init__(
        self,
        recommender: Recommender,
        k: int,
        fused: FusedRecommender | None = None,
        of_items: bool = False,
        bf16: bool = False,
        **options,
    ):
        self.recommender, self.k, self.bf16 = recommender, k, bf16
        self.ranker, self.options = fused or recommender, options
        columns = {"item": pa.string(), "rank": pa.int32(), "neighbour": pa.string()}
        if not of_items:
            columns = {"user": pa.string(), "rank": pa.int32(), "item": pa.string()}
        columns |= {"score": pa.float64(), "title": pa.string(), "source": pa.string()}
        self.schema = pa.schema(columns)
        self.popular = most_popular(recommender.dataset, recommender.trie.item_to_number)[:k]
        self.titles = {item: recommender.dataset.title(item) for item in recommender.dataset.item_ids}

    def rows(self, users: Sequence[User]) -> pa.Table:
        """Return a row for each item of each user's list, in the order of the users, best first."""
        index = self.recommender.dataset.index
        histories = [[item for item in items if item in index] for _, items in users]
        asked = [history for history in histories if history]
        with torch.autocast(self.recommender.model.device.type, torch.bfloat16, enabled=self.bf16):
            lists = iter(self.ranker.recommend(asked, self.k, **self.options) if asked else [])
        ranked = [next(lists) if history else self.popular for history in histories]
        entries = list(chain.from_iterable(ranked))
        lengths = [len(best) for best in ranked]
        sources = [MODEL if history else POPULARITY for history in histories]
        columns = (  # whole columns: a tuple for each row would cost as much as a tenth of a small model's search
            np.repeat(np.array([user for user, _ in users], object), lengths),
            np.concatenate([np.arange(1, length + 1) for length in lengths]),
            [entry.item for entry in entries],
            [round(entry.score, DIGITS) for entry in entries],
            [self.titles[entry.item] for entry in entries],
            np.repeat(np.array(sources, object), lengths),
        )
        return to_table(columns, self.schema)


def most_popular(dataset: InteractionDataset, candidates: Collection[str]) -> list[ScoredItem]:
    """Return the candidates with their number of interactions, nothing held out, the most popular first."""
    counts = Counter(chain.from_iterable(dataset.histories.values()))
    items = sorted((item for item in dataset.item_ids if item in candidates), key=lambda item: -counts[item])
    return [ScoredItem(item, counts[item]) for item in items]


def list_lengths(table: pa.Table) -> Counter[int]:
    """Return length of a list -> number of lists in rows of `UserLists`."""
    return Counter(pc.value_counts(table.column(0)).field("counts").to_pylist())


class PairScores:
    """The scores of pairs of user and item, by a model that scores ratings; users are asked with all they liked.

    Args:
        fused: the model's fusion with like-rates; None: the scores are the model's own.
    """

    schema = pa.schema({"user": pa.string(), "item": pa.string(), "score": pa.float64()})

    def __init__(self, scorer: Scorer, batch_size: int, bf16: bool = False, fused: FusedScorer | None = None):
        self.scorer, self.batch_size, self.bf16, self.fused = scorer, batch_size, bf16, fused
        self.liked = liked_items(scorer.dataset)

    def rows(self, pairs: Sequence[Pair]) -> pa.Table:
        """Return a row for each pair whose item is known; a user who is not in the data is asked without history."""
        known = [pair for pair in pairs if pair[1] in self.scorer.dataset.items]
        histories = [[other for other in self.liked.get(user, []) if other != item] for user, item in known]
        users = [user if user in self.liked else None for user, _ in known]
        if not known:
            return self.schema.empty_table()
        part = make_ratings(self.scorer.dataset, histories, [item for _, item in known], users)
        if self.fused is not None:
            scores = self.fused.log_odds(part, self.batch_size, self.bf16)
        else:
            with torch.autocast(self.scorer.model.device.type, torch.bfloat16, enabled=self.bf16):
                scores = self.scorer.score(part, batch_size=self.batch_size)
        # Not rounded: those of cold users and items can be tiny, and still rank them.
        return to_table((*zip(*known, strict=True), scores), self.schema)


def liked_items(dataset: RatingsDataset) -> dict[str, list[str]]:
    """Return user -> all items that the user liked, nothing held out, oldest first."""
    columns = {
        name: np.concatenate([to_numpy(part, name) for part in dataset.parts.values()])
        for name in ("uid", "iid", "label", "timestamp")
    }
    order = np.lexsort((columns["timestamp"], columns["uid"]))
    users = columns["uid"][order]
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    liked = {}
    for rows in np.split(order, starts[1:]):
        items = columns["iid"][rows][columns["label"][rows] == 1]
        liked[str(columns["uid"][rows[0]])] = list(dict.fromkeys(map(str, items.tolist())))
    return liked


def to_table(columns: Sequence[Iterable], schema: pa.Schema) -> pa.Table:
    """Return columns as a table."""
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.table(arrays, schema=schema)
