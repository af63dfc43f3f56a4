"""Fusion of several sources of scores on the union of their best items, with weights chosen on valid."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reclingua.baselines import Baselines, valid_parts
from reclingua.baselines.histories import Histories
from reclingua.baselines.selection import ndcg, rank_items, score_blocks
from reclingua.datasets.interactions import InteractionDataset

STRONGEST = ("co-occurrence", "item-knn", "ease")  # together, on valid of MovieLens-100k
DEPTH = 50  # best items of a baseline that are candidates
RANK_OFFSET = 10  # of reciprocal rank fusion: 1 / (RANK_OFFSET + rank)
METHODS = ("scores", "ranks")
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # of a source; that of the first one is 1
BY_DISTANCE = sorted(WEIGHTS, key=lambda weight: abs(np.log(weight + 1e-9)))  # from 1
ROUNDS = 3  # in which the weights are chosen one by one


@dataclass(frozen=True)
class Candidates:
    """The items that are ranked for each history, and the scores that each source gives them.

    Args:
        numbers: int64 [histories, width], item numbers in ascending order, so that ties are broken by popularity; -1
            for none.
        scores: float [sources, histories, width]; without meaning where there is no candidate.
    """

    numbers: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class BaselineFusion:
    """Baselines whose scores are combined, with weights chosen on valid: what a model's fusion has to beat."""

    baselines: Baselines
    names: tuple[str, ...]
    method: str
    weights: list[float]
    valid_ndcg: float

    @property
    def name(self) -> str:
        return " + ".join(self.names)

    def describe(self) -> dict:
        """Return method, weights and NDCG@10 on valid, for a results file."""
        return {"method": self.method, "weights": self.weights, "valid_ndcg": self.valid_ndcg}

    def ranks(
        self, histories: Sequence[Sequence[str]], targets: Sequence[str], k: int, excludes_seen: bool
    ) -> np.ndarray:
        """Return the rank of each target from 1, int64 [histories]; 0 where it is not among the best `k`."""
        encoded, numbers = self.baselines.catalogue.encode(histories), self.baselines.catalogue.encode_items(targets)
        candidates = baseline_candidates(self.baselines, self.names, encoded, excludes_seen)
        ranks = rank_candidates(candidates, fuse(candidates, self.method, self.weights), numbers)
        return np.where(ranks > k, 0, ranks)


def rank_by_all(
    dataset: InteractionDataset,
    baselines: Baselines,
    histories: Sequence[Sequence[str]],
    targets: Sequence[str],
    k: int,
    excludes_seen: bool,
    fused: Sequence[str] = STRONGEST,
) -> tuple[dict[str, np.ndarray], BaselineFusion | None]:
    """Return name -> ranks as `Baselines.ranks` does, the fusion of the baselines `fused` last, and that fusion.

    Where one of `fused` was left out there is no such row, and None.
    """
    ranks = baselines.ranks(histories, targets, k, excludes_seen)
    if not all(name in baselines.models for name in fused):
        return ranks, None
    fusion = fit_baseline_fusion(dataset, baselines, fused, excludes_seen)
    return ranks | {fusion.name: fusion.ranks(histories, targets, k, excludes_seen)}, fusion


def fused_alone(names: Sequence[str]) -> Sequence[str]:
    """Return the baselines whose fusion without a model is set beside its fusion with `names`.

    A single name is joined by co-occurrence, co-occurrence itself by EASE; no name stands for STRONGEST.
    """
    if len(names) == 1:
        return ("co-occurrence", names[0] if names[0] != "co-occurrence" else "ease")
    return names or STRONGEST


def fit_baseline_fusion(
    dataset: InteractionDataset, baselines: Baselines, names: Sequence[str], excludes_seen: bool
) -> BaselineFusion:
    """Choose the weights of a fusion of baselines on valid."""
    histories, targets = valid_parts(dataset, baselines.catalogue)
    candidates = baseline_candidates(baselines, names, histories, excludes_seen)
    return BaselineFusion(baselines, tuple(names), *choose_weights(candidates, targets))


def baseline_candidates(
    baselines: Baselines, names: Sequence[str], histories: Histories, excludes_seen: bool
) -> Candidates:
    """Return the union of the best items of each of the baselines, with their scores."""
    numbers = unite(best_candidates(baselines, names, histories, histories if excludes_seen else None))
    return Candidates(numbers, np.stack(score_candidates(baselines, names, histories, numbers)))


def unite(lists: Sequence[np.ndarray]) -> np.ndarray:
    """Return the union of item numbers of each row, int64 [rows, 1 or more], ascending, -1 for none at the end.

    Args:
        lists: int64 [rows, any] each, -1 for none.
    """
    none = np.iinfo(np.int64).max
    numbers = np.concatenate(lists, axis=1)
    numbers = np.sort(np.where(numbers < 0, none, numbers), axis=1)
    numbers[:, 1:][numbers[:, 1:] == numbers[:, :-1]] = none
    numbers = np.sort(numbers, axis=1)
    width = int((numbers < none).sum(1).max(initial=1))
    return np.where(numbers[:, :width] < none, numbers[:, :width], -1)


def best_candidates(
    baselines: Baselines,
    names: Sequence[str],
    histories: Histories,
    excluded: Histories | None,
    allowed: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return the best DEPTH items of each of the baselines, int64 [histories, DEPTH or fewer], -1 for none.

    Args:
        excluded: items of each history that are left out.
        allowed: bool [items], which ones can be returned at all; None: all.
    """
    return [rank_items(baselines.models[name], histories, DEPTH, excluded, allowed) for name in names]


def score_candidates(
    baselines: Baselines, names: Sequence[str], histories: Histories, numbers: np.ndarray
) -> list[np.ndarray]:
    """Return the scores that each of the baselines gives to `numbers` [histories, width], float32 of that shape."""
    return [
        np.concatenate(
            [
                np.take_along_axis(scores, np.maximum(numbers[rows], 0), axis=1)
                for rows, scores in score_blocks(baselines.models[name], histories)
            ]
        )
        for name in names
    ]


def comparable_scores(candidates: Candidates, method: str) -> np.ndarray:
    """Return the scores of each source on a common scale, float64 [sources, histories, width].

    Args:
        method: "scores", standardized to mean 0 and variance 1 over the candidates of a history; or "ranks", the
            reciprocal 1 / (RANK_OFFSET + rank) among them (Cormack et al., 2009).
    """
    exists = candidates.numbers >= 0
    scores = np.where(exists, candidates.scores.astype(np.float64), -np.inf)
    if method == "ranks":
        order = np.argsort(-scores, axis=2, kind="stable")
        return 1 / (RANK_OFFSET + 1 + np.argsort(order, axis=2, kind="stable"))
    values, count = np.where(exists, scores, 0), np.maximum(exists.sum(1), 1)[:, None]
    centred = np.where(exists, values - values.sum(2, keepdims=True) / count, 0)
    deviation = np.sqrt((centred**2).sum(2, keepdims=True) / count)
    return centred / np.maximum(deviation, 1e-9)


def fuse(candidates: Candidates, method: str, weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sums of comparable scores, float64 [histories, width], -inf where there is no candidate."""
    scores = np.tensordot(np.asarray(weights), comparable_scores(candidates, method), axes=1)
    return np.where(candidates.numbers >= 0, scores, -np.inf)


def rank_candidates(candidates: Candidates, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the rank of each target by `scores` [histories, width], int64 [histories] from 1; 0: no candidate."""
    is_target = candidates.numbers == targets[:, None]
    column = is_target.argmax(1)[:, None]
    of_target = np.take_along_axis(scores, column, axis=1)
    is_before = (scores == of_target) & (np.arange(scores.shape[1]) < column)
    ranks = 1 + (scores > of_target).sum(1) + is_before.sum(1)
    return np.where(is_target.any(1), ranks, 0)


def choose_weights(candidates: Candidates, targets: np.ndarray) -> tuple[str, list[float], float]:
    """Return the method and the weights with the best NDCG@10, and that NDCG@10.

    The weight of the first source is 1; the others start at 1 and are chosen from WEIGHTS one by one, in turn. Of
    equal choices the one nearest to 1 is taken.
    """
    best: tuple[str, list[float], float] = METHODS[0], [], -1.0
    for method in METHODS:
        comparable = comparable_scores(candidates, method)

        def quality(weights: list[float], comparable: np.ndarray = comparable) -> float:
            scores = np.where(candidates.numbers >= 0, np.tensordot(weights, comparable, axes=1), -np.inf)
            return ndcg(rank_candidates(candidates, scores, targets))

        weights = [1.0] * len(comparable)
        for _ in range(ROUNDS):
            before = list(weights)
            for source in range(1, len(weights)):
                choices = [[*weights[:source], value, *weights[source + 1 :]] for value in BY_DISTANCE]
                weights = max(choices, key=quality)  # the first of equal ones
            if weights == before:
                break
        if quality(weights) > best[2]:
            best = method, weights, quality(weights)
    return best
