"""Models of the server, each with the catalogue of its items. They never change: a reload opens new ones."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from reclingua.decoding.beam_search import ScoredItem
from reclingua.inference.catalogue import Catalogue
from reclingua.inference.fusion import DEPTH, FusedRecommender, load_fusion
from reclingua.inference.loading import load_metadata, load_next_item_dataset
from reclingua.inference.recommender import Recommender
from reclingua.inference.scorer import Scorer
from reclingua.inference.user_lists import liked_items, most_popular
from reclingua.utils.errors import InputError
from reclingua.utils.provenance import fingerprint

VERSION_LENGTH = 12  # hex digits of a catalogue's fingerprint
WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer*.json")  # files of a model in memory


class ListRequest(NamedTuple):
    """A list to compute.

    Args:
        history: known items, oldest first, one at least.
        excluded: items that are left out, those of the history not among them.
        exclude_seen: leave out the items of the history as well.
    """

    history: list[str]
    k: int
    excluded: Collection[str]
    exclude_seen: bool


class ScoreRequest(NamedTuple):
    """Known items to score after a history of known items; `user` is an id of the ratings, or None."""

    history: list[str]
    items: list[str]
    user: str | None = None


@dataclass(frozen=True)
class ModelOptions:
    """How the checkpoints of the server are opened; the flags of serve.py.

    Args:
        num_beams: width of every search, and so the longest list.
        batch_size: rows that are computed together.
    """

    data_path: str = "data"
    dataset: str | None = None
    index_file: str | None = None
    base_model: str | None = None
    cf_model: str | None = None
    device: str = "cpu"
    bf16: bool = False
    num_beams: int = 20
    batch_size: int = 32


class NextItemModel:
    """A next-item model and the fusions stored in its checkpoint, with the catalogue of its items.

    Args:
        fused: fusions by whether their weights were chosen with the items of the history left out.
        weights: `weight_files` of the checkpoint as it was loaded.

    Attributes:
        popular: all items with their number of interactions, the most popular first.
        counts: the same by item.
        users: empty, the model knows histories alone.
        version: fingerprint of semantic IDs and titles.
    """

    kind: Literal["next-item"] = "next-item"
    users: frozenset[str] = frozenset()

    def __init__(
        self,
        name: str,
        recommender: Recommender,
        fused: dict[bool, FusedRecommender],
        options: ModelOptions,
        weights: dict[str, tuple[int, int]],
    ):
        self.name, self.recommender, self.fused = name, recommender, fused
        self.options, self.weights = options, weights
        self.dataset, self.max_his_len = recommender.dataset, recommender.metadata.max_his_len
        self.popular = most_popular(self.dataset, self.dataset.index)
        titles = {item: self.dataset.title(item) for item in self.dataset.index}
        self.counts = {entry.item: int(entry.score) for entry in self.popular}
        self.catalogue = Catalogue(titles, self.counts)
        self.version = fingerprint([self.dataset.index, titles])[:VERSION_LENGTH]

    def max_k(self, fuse: bool) -> int:
        """Return the length of the longest list."""
        return min(DEPTH, self.options.num_beams) if fuse else self.options.num_beams

    def recommend(self, requests: Sequence[ListRequest]) -> list[list[ScoredItem]]:
        """Return the list of each request, best first."""
        left_out = [[*request.excluded, *request.history * request.exclude_seen] for request in requests]
        with self._autocast():
            lists = self.recommender.recommend(
                [request.history for request in requests],
                self.options.num_beams,
                excluded=left_out if any(left_out) else None,
                num_beams=self.options.num_beams,
                batch_size=self.options.batch_size,
            )
        return [ranked[: request.k] for request, ranked in zip(requests, lists, strict=True)]

    def recommend_fused(self, requests: Sequence[ListRequest]) -> list[list[ScoredItem]]:
        """Return the list of each request by the fusion for its `exclude_seen`, best first."""
        lists: dict[int, list[ScoredItem]] = {}
        for exclude_seen, fused in self.fused.items():
            rows = [row for row, request in enumerate(requests) if request.exclude_seen == exclude_seen]
            if not rows:
                continue
            with self._autocast():
                ranked = fused.recommend(
                    [requests[row].history for row in rows],
                    max(requests[row].k for row in rows),
                    exclude_seen,
                    self.options.batch_size,
                    excluded=[requests[row].excluded for row in rows],
                )
            lists.update(zip(rows, ranked, strict=True))
        return [lists[row][: request.k] for row, request in enumerate(requests)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[tuple[float, float | None]]]:
        """Return (log-probability, None) of each item of each request."""
        histories, items = [request.history for request in requests], [request.items for request in requests]
        with self._autocast():
            scores = self.recommender.score(histories, items, batch_size=self.options.batch_size)
        return [[(score, None) for score in row.tolist()] for row in scores]

    def warm_up(self) -> None:
        """Compute one list and one score, so that the first request is fast and a model that fails is not served."""
        item = self.popular[0].item
        self.recommend([ListRequest([item], 1, (), False)])
        self.score([ScoreRequest([item], [item])])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.recommender.model.device.type, torch.bfloat16, enabled=self.options.bf16)


class RatingModel:
    """A Yes/No or collaborative model, with the catalogue of the items of its ratings.

    Attributes:
        users: ids of all users with ratings.
        version: fingerprint of the items' texts.
    """

    kind: Literal["rating"] = "rating"

    def __init__(self, name: str, scorer: Scorer, options: ModelOptions):
        self.name, self.scorer, self.options, self.dataset = name, scorer, options, scorer.dataset
        self.max_his_len = scorer.metadata.max_his_len
        self.users = frozenset(liked_items(self.dataset))
        titles = {item: str(texts["title"]) for item, texts in self.dataset.items.items()}
        self.catalogue = Catalogue(titles, Counter(map(str, self.dataset.parts["train"]["iid"])))
        self.version = fingerprint(titles)[:VERSION_LENGTH]

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[tuple[float, float | None]]]:
        """Return (logit, probability of liking) of each item of each request."""
        rows = [(request.history, item, request.user) for request in requests for item in request.items]
        histories, items, users = zip(*rows, strict=True)
        with torch.autocast(self.scorer.model.device.type, torch.bfloat16, enabled=self.options.bf16):
            scores = self.scorer.score(histories, items, users, batch_size=self.options.batch_size)
        pairs = iter(zip(scores.tolist(), self.scorer.probabilities(scores).tolist(), strict=True))
        return [[next(pairs) for _ in request.items] for request in requests]

    def warm_up(self) -> None:
        """Score one item."""
        self.score([ScoreRequest([], [next(iter(self.catalogue.titles))])])


ServedModel = NextItemModel | RatingModel


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint folder and its name in requests; `open` can be called again when its files have changed."""

    name: str
    folder: Path
    options: ModelOptions

    def open(self, previous: ServedModel | None = None) -> ServedModel:
        """Open the checkpoint with its items, semantic IDs and fusions as they are now.

        Args:
            previous: what this source opened before; a next-item model whose weights are the same files is reused.

        Raises:
            InputError: as `Recommender.from_pretrained` and `Scorer.from_pretrained`.
        """
        options, metadata = self.options, load_metadata(self.folder)
        if metadata.method != "lcrec":
            scorer = Scorer.from_pretrained(
                self.folder,
                options.data_path,
                dataset=options.dataset,
                base_model=options.base_model,
                cf_model=options.cf_model,
                device=options.device,
            )
            if options.bf16 and not scorer.templates:
                raise InputError(f"--bf16: {self.folder} is a collaborative model, which computes in float32")
            return RatingModel(self.name, scorer, options)
        weights = weight_files(self.folder)
        if isinstance(previous, NextItemModel) and previous.weights == weights:
            dataset = load_next_item_dataset(
                self.folder, metadata, options.data_path, options.dataset, options.index_file
            )
            old = previous.recommender
            recommender = Recommender(old.model, old.tokenizer, dataset, metadata)
        else:
            recommender = Recommender.from_pretrained(
                self.folder,
                options.data_path,
                dataset=options.dataset,
                index_file=options.index_file,
                base_model=options.base_model,
                device=options.device,
            )
        fused = {seen: load_fusion(self.folder, recommender, seen) for seen in (False, True)}
        present = {seen: fusion for seen, fusion in fused.items() if fusion is not None}
        return NextItemModel(self.name, recommender, present, options, weights)


def weight_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (time of change, size) of the files whose content a loaded model holds."""
    files = {path for pattern in WEIGHTS for path in folder.glob(pattern)}
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(files)}
