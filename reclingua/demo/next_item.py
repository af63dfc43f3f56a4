"""Behind the next-item tab of the demo page: a model and the baselines, asked for one history."""

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from reclingua.baselines import UNTUNED, fit_baselines
from reclingua.demo.remote import RemoteRecommender
from reclingua.inference.catalogue import Catalogue
from reclingua.inference.fusion import FusedRecommender
from reclingua.inference.recommender import Recommender
from reclingua.utils.errors import InputError

UNITS = {"popularity": "interactions", "co-occurrence": "co-occurrence"}  # of the baselines' scores
LOG_PROBABILITY = "log-probability"
FUSED_SCORE = "fused score"


class Recommended(NamedTuple):
    """An item of a list: title, formatted score, semantic ID, and whether the user took it."""

    title: str
    score: str
    path: str
    taken: bool


class Answer(NamedTuple):
    """A list, best first, the unit of its scores, and the rank of the item taken (0: not in the list)."""

    rows: list[Recommended]
    unit: str
    searched: int
    place: int
    seconds: float


class NextItem:
    """A next-item model, the baselines and the catalogue of one tab.

    Args:
        num_beams: items that are searched for, and the most that are shown.
        fused: the model fused with baselines, which is asked like a further recommender.
    """

    def __init__(
        self,
        recommender: Recommender | RemoteRecommender,
        num_beams: int,
        fused: FusedRecommender | None = None,
    ):
        self.recommender, self.num_beams, self.fused = recommender, num_beams, fused
        self.dataset, self.name = recommender.dataset, recommender.metadata.method
        self.max_his_len = recommender.metadata.max_his_len
        self.baselines = fit_baselines(self.dataset, names=UNTUNED)
        self.recommenders = [self.name, *([fused.name] if fused else []), *self.baselines.models]
        titles = {item: self.dataset.title(item) for item in self.dataset.item_ids}
        self.catalogue = Catalogue(titles, self.baselines.popularity)

    def test_user(self, name: str) -> tuple[str, list[str], str]:
        """Return (user, history, item taken) of the test user `name`, or of any for ""."""
        name = name.strip()[:100]
        user = name or random.choice(self.dataset.test_users)
        if len(self.dataset.histories.get(user, ())) < 3:
            raise InputError(
                f"there is no test user {user!r}; user ids are {', '.join(self.dataset.test_users[:3])}, ..."
            )
        history, taken = self.dataset.split(user, "test")
        return user, history, taken

    def ask(self, name: str, history: Sequence[str], k: int, exclude_seen: bool, taken: str | None = None) -> Answer:
        """Return the best `k` items after `history` (oldest first) by the recommender `name`."""
        started = time.perf_counter()
        if name == self.name:
            beams = self.num_beams
            (ranked,) = self.recommender.recommend([history], beams, exclude_seen=exclude_seen, num_beams=beams)
            unit, scored = LOG_PROBABILITY, [(entry.item, f"{entry.score:.2f}") for entry in ranked]
        elif self.fused and name == self.fused.name:
            (ranked,) = self.fused.recommend([history], self.num_beams, exclude_seen)
            unit, scored = FUSED_SCORE, [(entry.item, f"{entry.score:.2f}") for entry in ranked]
        else:
            unit, scores = UNITS[name], self.baselines.scores(name, history)
            items = self.baselines.recommend(name, history, self.num_beams, history if exclude_seen else ())
            decimals = 0 if name == "popularity" else 4
            scored = [(item, f"{scores[item]:,.{decimals}f}") for item in items]
        rows = [
            Recommended(self.catalogue.title(item), score, "".join(self.dataset.index[item]), item == taken)
            for item, score in scored
        ]
        place = next((rank for rank, row in enumerate(rows, start=1) if row.taken), 0)
        return Answer(rows[:k], unit, len(rows), place, time.perf_counter() - started)
