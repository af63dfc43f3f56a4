"""Rank targets with a baseline, and choose its settings on the valid targets by NDCG@10."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from reclingua.baselines.base import Baseline, best_items, exclude, target_ranks
from reclingua.baselines.histories import Histories

K = 10  # of NDCG@K
MAX_USERS = 5000  # valid users that choose settings, spread evenly over all
MAX_GRID_ITEMS = 4000  # with more items only the first value of each FIT_GRID is tried: a fit takes long
CELLS = 2**24  # scores in memory at a time


def score_blocks(
    baseline: Baseline,
    histories: Histories,
    excluded: Histories | None = None,
    allowed: np.ndarray | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, scores [rows, items]) for all histories, some rows at a time; -inf for items that are left out.

    Args:
        excluded: items of each history that are left out.
        allowed: bool [items], which ones are not left out for all; None: all.
    """
    size = max(1, CELLS // histories.num_items)
    for start in range(0, len(histories), size):
        rows = slice(start, min(start + size, len(histories)))
        scores = baseline.scores(histories[rows])
        if excluded is not None:
            exclude(scores, excluded[rows])
        if allowed is not None:
            scores[:, ~allowed] = -np.inf
        yield rows, scores


def rank_targets(
    baseline: Baseline, histories: Histories, targets: np.ndarray, excluded: Histories | None = None
) -> np.ndarray:
    """Return the rank of each target among all items, int64 [histories] from 1; 0 for an excluded target."""
    blocks = score_blocks(baseline, histories, excluded)
    return np.concatenate([target_ranks(scores, targets[rows]) for rows, scores in blocks])


def rank_items(
    baseline: Baseline,
    histories: Histories,
    k: int,
    excluded: Histories | None = None,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Return the numbers of the best `k` items of each history, int64 [histories, k or fewer], -1 for none."""
    blocks = score_blocks(baseline, histories, excluded, allowed)
    return np.concatenate([best_items(scores, k) for _, scores in blocks])


def ndcg(ranks: np.ndarray, k: int = K) -> float:
    """Return NDCG@k of the ranks of targets, 0 = not ranked."""
    is_hit = (ranks > 0) & (ranks <= k)
    return float((is_hit / np.log2(np.maximum(ranks, 1) + 1)).mean())


def fit_best(
    kind: type[Baseline], train: Histories, valid: Histories, targets: np.ndarray, excludes_seen: bool
) -> tuple[Baseline, float | None]:
    """Fit a baseline with each of its settings and return the best on valid, with its NDCG@10.

    The model is fitted to the training histories alone. Of equal settings the earlier ones win.
    """
    fit_grid: Mapping[str, tuple[float, ...]] = kind.FIT_GRID
    if train.num_items > MAX_GRID_ITEMS:
        fit_grid = {name: values[:1] for name, values in fit_grid.items()}
    if not kind.FIT_GRID and not kind.SCORE_GRID:
        return kind().fit(train), None
    best: tuple[Baseline, float] | None = None
    for fit_values in itertools.product(*fit_grid.values()):
        model = kind(dict(zip(fit_grid, fit_values, strict=True))).fit(train)
        model_best = 0.0, model.settings
        for values in itertools.product(*kind.SCORE_GRID.values()):
            model.settings = model.settings | dict(zip(kind.SCORE_GRID, values, strict=True))
            quality = ndcg(rank_targets(model, valid, targets, valid if excludes_seen else None))
            model_best = max(model_best, (quality, model.settings), key=lambda pair: pair[0])
        quality, model.settings = model_best
        if best is None or quality > best[1]:
            best = model, quality
    assert best is not None  # no grid is empty
    return best
