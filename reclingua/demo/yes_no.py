"""Behind the Yes/No tab of the demo page: a model, asked with its collaborative model and by titles alone."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reclingua.datasets.ratings import make_ratings, to_numpy
from reclingua.inference.catalogue import Catalogue
from reclingua.inference.rating_fusion import FusedScorer
from reclingua.inference.scorer import Scorer
from reclingua.utils.errors import InputError


class Rating(NamedTuple):
    """A test rating: user, what the user had liked before, item, and whether the user liked it."""

    user: int
    history: list[str]
    item: str
    liked: bool


class Answer(NamedTuple):
    """Probabilities of Yes, and the seconds that they took.

    Args:
        collaborative: with the collaborative model, None where it knows nothing (`why_not`).
        titles: from titles alone.
        fused: of the fusion with like-rates, None if the checkpoint has none.
    """

    collaborative: float | None
    titles: float
    fused: float | None
    why_not: str
    seconds: float


class YesOrNo:
    """A Yes/No model, its fusion with like-rates if there is one, and the catalogue of one tab."""

    def __init__(self, scorer: Scorer, fused: FusedScorer | None = None):
        self.fused = fused
        self.scorer, self.dataset, self.name = scorer, scorer.dataset, scorer.name
        self.max_his_len = scorer.metadata.max_his_len
        self.test = self.dataset.parts["test"]
        self.test_users = to_numpy(self.test, "uid")
        train = self.dataset.parts["train"]
        self.known_users = set(to_numpy(train, "uid").tolist())
        counts = Counter(map(str, to_numpy(train, "iid").tolist()))
        self.catalogue = Catalogue({item: str(texts["title"]) for item, texts in self.dataset.items.items()}, counts)
        self.known_items = set(counts)

    def test_rating(self, user: str) -> Rating:
        """Return any test rating of `user`, or of anybody for ""."""
        user = user.strip()[:100]
        rows = np.arange(len(self.test))
        if user:
            is_number = user.isdecimal() and len(user) < 10
            rows = np.flatnonzero(self.test_users == int(user)) if is_number else np.array([], dtype=int)
        if not len(rows):
            examples = ", ".join(map(str, np.unique(self.test_users)[:3]))
            raise InputError(f"user {user!r} has no test ratings; user ids are {examples}, ...")
        row = self.test[int(random.choice(rows))]
        return Rating(row["uid"], [str(item) for item in row["his"]], str(row["iid"]), bool(row["label"]))

    def ask(self, user: int | None, history: Sequence[str], item: str) -> Answer:
        """Return whether somebody who liked `history` (oldest first) will like `item`; no `user`: a stranger."""
        started = time.perf_counter()
        why_not = self._missing_knowledge(user, history, item)
        is_warm = [False] if why_not else [True, False]  # a cold row is asked by titles alone
        rows = len(is_warm)
        users = [None if user is None else str(user)] * rows
        part = make_ratings(self.dataset, [history] * rows, [item] * rows, users, is_warm)
        scores = self.scorer.score(part, cold_text_only=True, batch_size=rows)
        *collaborative, titles = self.scorer.probabilities(scores).tolist()
        fused = None
        if self.fused is not None:
            fused = float(1 / (1 + np.exp(-self.fused.log_odds(part.select([0]))[0])))
        seconds = time.perf_counter() - started
        return Answer(collaborative[0] if collaborative else None, titles, fused, why_not, seconds)

    def _missing_knowledge(self, user: int | None, history: Sequence[str], item: str) -> str:
        """Return why the collaborative model knows nothing of this pair; "" if it does."""
        cf_model: Any = self.scorer.model.cf_model
        if cf_model is None:
            return f"{self.name} has none"
        if item not in self.known_items:
            return "nobody rated this item in training"
        if user not in self.known_users and not (cf_model.history_length and history):
            needs = "a history or a user" if cf_model.history_length else "a user"
            return f"its collaborative model has to know {needs} of the training data; take a test user"
        return ""
