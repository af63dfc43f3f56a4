"""Behind the page's second tab: a model that answers Yes or No, with its collaborative knowledge and without."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from reclingua.datasets.ratings import COLUMNS, to_numpy
from reclingua.demo.catalogue import Catalogue
from reclingua.inference.loading import open_asked, questions_of
from reclingua.inference.scorer import ask
from reclingua.models.language import load_tokenizer
from reclingua.models.registry import run_name
from reclingua.utils.errors import InputError


class Rating(NamedTuple):
    """A test rating: whose, what the user had liked before, which item, and whether the user liked that."""

    user: int
    history: list[str]
    item: str
    liked: bool


class Answer(NamedTuple):
    """The probability of Yes with collaborative knowledge, None where there is none, and from titles alone."""

    collaborative: float | None
    titles: float
    why_not: str
    seconds: float


class YesOrNo:
    """A model tuned by TALLRec, CoLLM, BinLLM, CoRA or a soft prompt, and what it takes to ask it.

    Args:
        folder, record: of the model; see `opening.read_record`.

    Raises:
        InputError: model and data are not there, or do not belong together.
    """

    def __init__(
        self,
        folder: Path,
        record: dict,
        data_path: str,
        dataset: str | None,
        base_model: str | None = None,
        cf_model: str | None = None,
    ):
        self.record = record
        self.model, self.dataset = open_asked(folder, record, data_path, dataset, base_model, cf_model)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(folder)
        self.name = run_name(self.model, record["method"])
        self.test = self.dataset.parts["test"]
        self.test_users = to_numpy(self.test, "uid")
        train = self.dataset.parts["train"]
        self.known_users = set(to_numpy(train, "uid").tolist())
        counts = Counter(map(str, to_numpy(train, "iid").tolist()))
        self.catalogue = Catalogue({item: str(about["title"]) for item, about in self.dataset.items.items()}, counts)
        self.known_items = set(counts)

    def test_rating(self, user: str) -> Rating:
        """Any test rating of `user`, or of anybody for ""."""
        user = user.strip()[:100]
        rows = np.arange(len(self.test))
        if user:
            rows = np.flatnonzero(self.test_users == int(user)) if user.isdecimal() and len(user) < 10 else []
        if not len(rows):
            some = ", ".join(map(str, np.unique(self.test_users)[:3]))
            raise InputError(f"user {user!r} has no test ratings; users are called {some}")
        row = self.test[int(random.choice(rows))]
        return Rating(row["uid"], [str(item) for item in row["his"]], str(row["iid"]), bool(row["label"]))

    def ask(self, user: int | None, history: Sequence[str], item: str) -> Answer:
        """Will somebody who liked `history` (oldest first) like `item`? `user` is None for nobody in the data."""
        began = time.perf_counter()
        why_not = self._ignorance(user, history, item)
        ways = [0] if why_not else [1, 0]  # not_cold: of cold rows the titles are all that is told
        rows = {
            "uid": [user or 0] * len(ways),
            "iid": [int(item)] * len(ways),
            "label": [0] * len(ways),
            "timestamp": [0] * len(ways),
            "his": [[int(liked) for liked in history]] * len(ways),
            "not_cold": ways,
        }
        part = Dataset(pa.table({name: pa.array(rows[name], kind) for name, kind in COLUMNS.items()}))
        questions = questions_of(part, self.dataset, self.tokenizer, self.model, self.record, 0, cold_text_only=True)
        logits = ask(self.model, questions, len(ways), show_progress=False)
        *collaborative, titles = torch.from_numpy(self.model.log_odds(logits)).sigmoid().tolist()
        return Answer(collaborative[0] if collaborative else None, titles, why_not, time.perf_counter() - began)

    def _ignorance(self, user: int | None, history: Sequence[str], item: str) -> str:
        """Why collaborative knowledge has nothing to say here; "" if it has."""
        if self.model.cf_model is None:
            return f"{self.name} has none"
        if item not in self.known_items:
            return "nobody rated this item in training"
        if user not in self.known_users and not (self.model.cf_model.history_length and history):
            reads = "a history or a user" if self.model.cf_model.history_length else "a user"
            return f"its collaborative model has to know {reads} of the training data; take a test user"
        return ""
