"""Fusion of a next-item model with baselines: fitted on valid, stored beside the checkpoint, used by test and demo.

fused = FusedRecommender.fit(recommender, baselines, ["ease"], exclude_seen=True)
fused.recommend([["12", "55", "7"]], k=10)
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import distributed

from reclingua.baselines import NEXT_ITEM_BASELINES, Baselines, fit_baselines
from reclingua.baselines.fusion import (
    DEPTH,
    Candidates,
    best_candidates,
    choose_weights,
    fuse,
    rank_candidates,
    score_candidates,
    unite,
)
from reclingua.datasets.tasks import held_out_samples
from reclingua.decoding.beam_search import ScoredItem
from reclingua.inference.recommender import Recommender
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json, write_json

FUSION_FILE = "fusion.json"  # in a checkpoint
AGAIN = "delete it, and test.py --fuse will fit its own"
MAX_USERS = 2000  # valid users that choose weights, spread evenly over all


@dataclass(frozen=True)
class FusionSettings:
    """How the scores of a model and of baselines are combined, and on what the weights were chosen.

    Args:
        baselines: name -> its settings.
        method: of `reclingua.baselines.fusion.METHODS`.
        weights: of the model and of each baseline, in their order.
        excludes_seen, num_beams, prompt_id, score_over: how the model was searched.
        depth: best items of each baseline that are candidates.
        valid_users, valid_ndcg: users on which the weights were chosen, and NDCG@10 there.
    """

    baselines: dict[str, dict[str, Any]]
    method: str
    weights: list[float]
    excludes_seen: bool
    num_beams: int
    prompt_id: int
    score_over: str
    depth: int
    valid_users: int
    valid_ndcg: float


class FusedRecommender:
    """A next-item model and baselines: the candidates are the union of their best items, scored by all of them.

    Args:
        recommender: of the task seqrec.
        baselines: fitted; those of `settings` are among them.
        settings: how scores are combined.
    """

    def __init__(self, recommender: Recommender, baselines: Baselines, settings: FusionSettings):
        self.recommender, self.baselines, self.settings = recommender, baselines, settings
        self.names = list(settings.baselines)
        self.name = " + ".join([recommender.metadata.method, *self.names])

    def describe(self) -> str:
        """Return one line: how the scores are combined."""
        sources = zip([self.recommender.metadata.method, *self.names], self.settings.weights, strict=True)
        weights = ", ".join(f"{name} {weight:g}" for name, weight in sources)
        chosen = f"chosen on {self.settings.valid_users:,} users of valid, stored in {FUSION_FILE} of the checkpoint"
        return f"{self.name}: by {self.settings.method}, weights {weights}, {chosen}"

    @classmethod
    def fit(
        cls,
        recommender: Recommender,
        baselines: Baselines,
        names: Sequence[str],
        *,
        excludes_seen: bool,
        num_beams: int = 20,
        prompt_id: int | None = None,
        score_over: str = "vocabulary",
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> "FusedRecommender":
        """Choose the weights by NDCG@10 on up to MAX_USERS valid users; arguments as of `Recommender.recommend`."""
        dataset = recommender.dataset
        samples = held_out_samples(dataset, "valid", recommender.task, recommender.metadata.max_his_len)
        samples = samples.select(range(0, len(samples), -(-len(samples) // MAX_USERS)))
        histories, targets = zip(*(dataset.split(user, "valid") for user in samples["user"]), strict=True)
        settings = FusionSettings(
            baselines={name: baselines.models[name].settings for name in names},
            method="scores",
            weights=[1.0] * (1 + len(names)),
            excludes_seen=excludes_seen,
            num_beams=num_beams,
            prompt_id=recommender.prompt_ids[0] if prompt_id is None else prompt_id,
            score_over=score_over,
            depth=DEPTH,
            valid_users=len(samples),
            valid_ndcg=0.0,
        )
        unfitted = cls(recommender, baselines, settings)
        candidates = unfitted.build_candidates(samples, histories, None, batch_size, show_progress)
        method, weights, quality = choose_weights(candidates, baselines.catalogue.encode_items(targets))
        fitted = replace(settings, method=method, weights=weights, valid_ndcg=quality)
        return cls(recommender, baselines, fitted)

    def build_candidates(
        self,
        samples: datasets.Dataset,
        histories: Sequence[Sequence[str]],
        ranked: Sequence[Sequence[ScoredItem]] | None = None,
        batch_size: int = 32,
        show_progress: bool = False,
        excluded: Sequence[Collection[str]] | None = None,
    ) -> Candidates:
        """Return the candidates of each history with the scores of the model and of each baseline.

        Args:
            samples: of the histories, for the model.
            histories: whole, for the baselines, and left out of the candidates where the settings say so.
            ranked: the model's lists for the samples, if they were searched already.
            excluded: for each history further items to leave out.
        """
        settings, catalogue = self.settings, self.baselines.catalogue
        left_out: Sequence[Collection[str]] | None = histories if settings.excludes_seen else None
        if excluded is not None:
            seen = left_out or [[]] * len(excluded)
            left_out = [[*items, *further] for items, further in zip(seen, excluded, strict=True)]
        if ranked is None:
            prompts = self.recommender.encode(samples, settings.prompt_id)
            ranked = self.recommender.search(
                prompts, settings.num_beams, left_out, batch_size, settings.score_over, show_progress
            )
        found = np.full((len(ranked), max(map(len, ranked), default=0)), -1)
        for row, entries in enumerate(ranked):
            found[row, : len(entries)] = catalogue.encode_items(entry.item for entry in entries)
        encoded = catalogue.encode(histories)
        unwanted = catalogue.encode(left_out) if left_out is not None else None
        known = self.recommender.trie.item_to_number  # fewer after `Recommender.restrict`
        allowed = np.array([item in known for item in catalogue.items])
        best = best_candidates(self.baselines, self.names, encoded, unwanted, allowed)
        numbers = unite([found, *best])
        items = [[catalogue.items[number] for number in row[row >= 0]] for row in numbers]
        scores = np.zeros((1 + len(self.names), *numbers.shape), np.float32)
        exact = self.recommender.score(
            samples,
            items,
            prompt_id=settings.prompt_id,
            batch_size=batch_size,
            score_over=settings.score_over,
            show_progress=show_progress,
        )
        for row, values in enumerate(exact):
            scores[0, row, : len(values)] = values
        scores[1:] = score_candidates(self.baselines, self.names, encoded, numbers)
        return Candidates(numbers, scores)

    def rank_targets(self, candidates: Candidates, targets: Sequence[str], k: int) -> np.ndarray:
        """Return the rank of each target from 1, int64 [histories]; 0 where it is not among the best `k`."""
        scores = fuse(candidates, self.settings.method, self.settings.weights)
        ranks = rank_candidates(candidates, scores, self.baselines.catalogue.encode_items(targets))
        return np.where(ranks > k, 0, ranks)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        exclude_seen: bool = False,
        batch_size: int = 32,
        excluded: Sequence[Collection[str]] | None = None,
    ) -> list[list[ScoredItem]]:
        """Return for each history its best `k` items, best first, with their fused scores.

        Args:
            excluded: for each history further items to leave out.

        Raises:
            InputError: as `Recommender.recommend`.
        """
        samples = self.recommender.encode_histories(histories)
        asked = FusedRecommender(self.recommender, self.baselines, replace(self.settings, excludes_seen=exclude_seen))
        candidates = asked.build_candidates(samples, histories, batch_size=batch_size, excluded=excluded)
        scores = fuse(candidates, self.settings.method, self.settings.weights)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        items = self.baselines.catalogue.items
        return [
            [
                ScoredItem(items[candidates.numbers[row, column]], float(scores[row, column]))
                for column in columns
                if candidates.numbers[row, column] >= 0
            ]
            for row, columns in enumerate(order)
        ]


def checkpoint_sha256(folder: str | Path) -> str:
    """Return the fingerprint of the weights in a checkpoint folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_fusions(folder: Path, data_sha256: str) -> list[dict]:
    """Return the fusions stored in a checkpoint folder, [] if there are none.

    Args:
        data_sha256: fingerprint of the data that baselines are fitted to.

    Raises:
        InputError: the file is invalid, or its fusions were fitted to another checkpoint or other data.
    """
    path = folder / FUSION_FILE
    if not path.exists():
        return []
    content = read_json(path, "fusions, from test.py --fuse")
    if not isinstance(content.get("fusions"), list) or not all(
        isinstance(entry, dict) for entry in content["fusions"]
    ):
        raise InputError(f"{path}: has no list of fusions; {AGAIN}")
    if content.get("checkpoint_sha256") != checkpoint_sha256(folder):
        raise InputError(f"{path}: was fitted to another checkpoint than that of {folder}; {AGAIN}")
    if content.get("data_sha256") != data_sha256:
        raise InputError(f"{path}: its baselines were fitted to other data than that of this test; {AGAIN}")
    return content["fusions"]


def write_fusions(folder: Path, data_sha256: str, fusions: list[dict]) -> Path:
    """Write fusions into a checkpoint folder and return the file's path."""
    content = {"checkpoint_sha256": checkpoint_sha256(folder), "data_sha256": data_sha256, "fusions": fusions}
    write_json(folder / FUSION_FILE, content, indent=1)
    return folder / FUSION_FILE


def fuse_targets(
    folder: Path,
    recommender: Recommender,
    baselines: Baselines,
    names: Sequence[str],
    samples: datasets.Dataset,
    histories: Sequence[Sequence[str]],
    ranked: Sequence[Sequence[ScoredItem]],
    *,
    batch_size: int,
    **search,
) -> tuple[FusedRecommender, np.ndarray]:
    """Return the fusion with the baselines `names`, and the ranks of the targets of `samples` by it.

    It is the one that the checkpoint in `folder` holds, or is fitted on valid and stored there.

    Args:
        samples, histories, ranked: see `FusedRecommender.build_candidates`.
        search: `excludes_seen`, `num_beams`, `prompt_id`, `score_over`, as in `FusionSettings`.

    Raises:
        InputError: see `read_fusions`; or the stored fusion is of baselines with other settings.
    """
    path, wanted = folder / FUSION_FILE, {name: baselines.models[name].settings for name in names}
    fused = None
    for entry in read_fusions(folder, recommender.dataset.sha256("histories")):
        settings = parse_fusion(entry, path)
        if list(settings.baselines) == list(names) and all(entry[key] == value for key, value in search.items()):
            if settings.baselines != wanted:
                raise InputError(f"{path}: was fitted to another {', '.join(names)} (other settings); {AGAIN}")
            fused = FusedRecommender(recommender, baselines, settings)
    is_new = fused is None
    if fused is None:
        fused = FusedRecommender.fit(
            recommender, baselines, names, batch_size=batch_size, show_progress=True, **search
        )
    candidates = fused.build_candidates(samples, histories, ranked, batch_size, show_progress=True)
    if is_new and not (distributed.is_initialized() and distributed.get_rank()):
        save_fusion(folder, fused)
    return fused, fused.rank_targets(candidates, list(samples["item"]), search["num_beams"])


def load_fusion(folder: Path, recommender: Recommender, excludes_seen: bool | None = None) -> FusedRecommender | None:
    """Return the latest fusion that the checkpoint in `folder` holds, its baselines fitted again; None without one.

    A fusion with SASRec, whose folder it does not name, is passed over.

    Args:
        excludes_seen: only a fusion whose weights were chosen so is taken; None: any.
    """
    entries = read_fusions(folder, recommender.dataset.sha256("histories"))
    for settings in (parse_fusion(entry, folder / FUSION_FILE) for entry in reversed(entries)):
        is_asked = excludes_seen in (None, settings.excludes_seen)
        if is_asked and all(name in NEXT_ITEM_BASELINES for name in settings.baselines):
            fitted = fit_baselines(recommender.dataset, names=settings.baselines, settings=settings.baselines)
            return FusedRecommender(recommender, fitted, settings)
    return None


def save_fusion(folder: Path, fused: FusedRecommender) -> Path:
    """Add a fusion to those that the checkpoint in `folder` holds; return the path of the file."""
    data_sha256 = fused.recommender.dataset.sha256("histories")
    return write_fusions(folder, data_sha256, [*read_fusions(folder, data_sha256), asdict(fused.settings)])


def parse_fusion(entry: dict, path: Path) -> FusionSettings:
    """Return the settings of one entry of a fusion file; InputError if they are not of this version."""
    try:
        settings = FusionSettings(**entry)
        for name, values in settings.baselines.items():
            kind = NEXT_ITEM_BASELINES.get(name)
            known = {} if kind is None else kind.FIT_GRID | kind.SCORE_GRID
            if kind is not None and set(values) != set(known):
                raise InputError(f"{path}: has other settings of {name} than this version; {AGAIN}")
        if len(settings.weights) != 1 + len(settings.baselines) or settings.depth != DEPTH:
            raise ValueError
        np.asarray(settings.weights, np.float64)
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: holds a fusion of another version; {AGAIN}") from None
    return settings
