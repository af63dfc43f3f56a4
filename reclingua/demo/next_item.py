"""Behind the page's first tab: a model that generates the next item, and the two baselines, asked for one history."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset

from reclingua.baselines import fit_baselines
from reclingua.datasets.collators import encode_prompt
from reclingua.datasets.interactions import RecDataset
from reclingua.datasets.tasks import COLUMNS, make_sample, seqrec_task
from reclingua.demo.catalogue import Catalogue
from reclingua.inference import loading
from reclingua.inference.loading import instructions_of, open_indexed, phrasings_of
from reclingua.inference.recommender import recommend, trie_of
from reclingua.models.vocabulary import index_token_ids
from reclingua.utils.errors import InputError

UNITS = {"popularity": "interactions", "co-occurrence": "co-occurrence"}  # of scores; the model's are others
LOG_PROBABILITY = "log-probability"


class Recommended(NamedTuple):
    """An item of a list: its title, its score as it is to be read, its index, whether the user really took it."""

    title: str
    score: str
    path: str
    taken: bool


class Answer(NamedTuple):
    """A list, best first, what its scores are, and the place in it of what was really taken (0: not in it)."""

    rows: list[Recommended]
    unit: str
    searched: int
    place: int
    seconds: float


class NextItem:
    """A model tuned by LC-Rec, and what it takes to ask it.

    Args:
        folder, record: of the model; see `opening.read_record`.
        num_beams: items that are searched for, and the most that are shown.

    Raises:
        InputError: model and data are not there, or do not belong together.
    """

    def __init__(
        self,
        folder: Path,
        record: dict,
        data_path: str,
        dataset: str | None,
        index_file: str,
        num_beams: int,
        base_model: str | None = None,
    ):
        self.dataset: RecDataset = open_indexed(folder, record, "seqrec", data_path, dataset, index_file)
        self.name, self.num_beams, self.max_his_len = record["method"], num_beams, record["max_his_len"]
        self.task = seqrec_task(record["targets"])
        templates, answerable = phrasings_of(folder, record, self.task)
        self.template = templates[answerable[0]]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, tokenizer = loading.open_model(folder, record, self.device, base_model)
        token_ids = index_token_ids(tokenizer, self.dataset.index)
        self.trie = trie_of(token_ids, tokenizer, self.task)
        samples = Dataset(COLUMNS.arrow_schema.empty_table())  # they come one by one, see _search
        prompts = {self.task: templates}
        self.instructions = instructions_of(record, samples, self.dataset, tokenizer, prompts, token_ids)
        self.baselines = fit_baselines(self.dataset)
        self.recommenders = [self.name, *self.baselines]
        titles = {item: self.dataset.title(item) for item in self.dataset.item_ids}
        self.catalogue = Catalogue(titles, self.baselines["popularity"].counts)

    def test_user(self, name: str) -> tuple[str, list[str], str]:
        """(user, history, what the user really took) of the test user `name`, or of any for ""."""
        name = name.strip()[:100]
        user = name or random.choice(self.dataset.test_users)
        if len(self.dataset.histories.get(user, ())) < 3:
            raise InputError(
                f"there is no test user {user!r}; users are called {', '.join(self.dataset.test_users[:3])}"
            )
        return user, *self.dataset.split(user, "test")

    def ask(self, who: str, history: Sequence[str], k: int, exclude_seen: bool, taken: str | None = None) -> Answer:
        """The best `k` items after `history` (oldest first) by the recommender `who`."""
        began = time.perf_counter()
        seen = set(history) if exclude_seen else set()
        if who == self.name:
            ranked = self._search(list(history), exclude_seen)
            unit = LOG_PROBABILITY
        else:
            baseline, unit = self.baselines[who], UNITS[who]
            scores = baseline.scores(list(history))
            items = baseline.recommend(list(history), self.num_beams, seen)
            ranked = [(item, f"{scores[item]:,.{0 if who == 'popularity' else 4}f}") for item in items]
        rows = [
            Recommended(self.catalogue.title(item), score, "".join(self.dataset.index[item]), item == taken)
            for item, score in ranked
        ]
        place = next((place for place, row in enumerate(rows, start=1) if row.taken), 0)
        return Answer(rows[:k], unit, len(rows), place, time.perf_counter() - began)

    def _search(self, history: list[str], exclude_seen: bool) -> list[tuple[str, str]]:
        asked = dict(zip(COLUMNS, make_sample(self.task, history=history[-self.max_his_len :]), strict=True))
        prompt = encode_prompt(self.instructions.tokenizer, self.instructions.prompt(asked, self.template))
        loading.check_context_length(self.model, len(prompt) + self.trie.depth)
        excluded = [history] if exclude_seen else None
        (found,) = recommend(
            self.model,
            self.instructions,
            [asked],
            self.template,
            self.trie,
            self.num_beams,
            batch_size=1,
            excluded=excluded,
            show_progress=False,
        )
        return [(each.item, f"{each.score:.2f}") for each in found]
