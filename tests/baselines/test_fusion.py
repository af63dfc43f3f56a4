"""Fusion of scores: candidates, ranks and weights of slow, obvious versions."""

import numpy as np
import pytest

from reclingua.baselines import fit_baselines
from reclingua.baselines.fusion import (
    RANK_OFFSET,
    Candidates,
    baseline_candidates,
    choose_weights,
    fit_baseline_fusion,
    fuse,
    rank_candidates,
    unite,
)
from reclingua.datasets.interactions import open_interactions


def draw_candidates(rows=200, width=12, sources=3):
    """Candidates of random scores with ties; the last columns of some rows are empty."""
    draw = np.random.default_rng(0)
    numbers = np.sort(np.stack([draw.permutation(40)[:width] for _ in range(rows)]), axis=1)
    numbers[np.arange(width) >= draw.integers(2, width + 1, rows)[:, None]] = -1
    return Candidates(numbers, draw.integers(8, size=(sources, rows, width)).astype(np.float32)), draw


def test_union_of_lists():
    lists = [np.array([[4, 2, -1], [7, 7, 7]]), np.array([[2, 9], [-1, -1]])]
    assert unite(lists).tolist() == [[2, 4, 9], [7, -1, -1]]
    assert unite([np.full((2, 3), -1)]).tolist() == [[-1], [-1]]


@pytest.mark.parametrize("method", ["scores", "ranks"])
def test_fused_scores_and_ranks_of_a_slow_version(method):
    candidates, draw = draw_candidates()
    weights, targets = [1.0, 0.5, 2.0], draw.integers(40, size=200)
    scores = fuse(candidates, method, weights)
    ranks = rank_candidates(candidates, scores, targets)
    for row, numbers in enumerate(candidates.numbers):
        items = [number for number in numbers if number >= 0]
        total = np.zeros(len(items))
        for source, weight in enumerate(weights):
            values = candidates.scores[source, row, : len(items)].astype(float)
            if method == "ranks":
                order = sorted(range(len(items)), key=lambda column, values=values: -values[column])
                total += [weight / (RANK_OFFSET + 1 + order.index(column)) for column in range(len(items))]
            else:
                total += weight * (values - values.mean()) / max(values.std(), 1e-9)
        np.testing.assert_allclose(scores[row, : len(items)], total, atol=1e-9)
        assert np.isneginf(scores[row, len(items) :]).all()
        order = sorted(range(len(items)), key=lambda column, row=row: -scores[row, column])
        expected = [items[column] for column in order]
        assert ranks[row] == (expected.index(targets[row]) + 1 if targets[row] in expected else 0)


def test_rows_without_candidates_rank_nothing():
    candidates = Candidates(np.full((2, 1), -1), np.zeros((2, 2, 1), np.float32))
    for method in ("scores", "ranks"):
        assert rank_candidates(candidates, fuse(candidates, method, [1, 1]), np.array([0, 3])).tolist() == [0, 0]


def test_weights_find_the_source_that_knows():
    candidates, draw = draw_candidates()
    column = draw.integers((candidates.numbers >= 0).sum(1))
    targets = candidates.numbers[np.arange(200), column]
    candidates.scores[1, np.arange(200), column] = 9  # the second source knows every target
    method, weights, quality = choose_weights(candidates, targets)
    assert weights[0] == 1 and weights[1] >= 5 and quality > 0.9
    assert choose_weights(candidates, targets) == (method, weights, quality)


def test_fused_baselines_rank_as_on_valid_and_leave_seen_items_out(toy):
    dataset = open_interactions(toy, "toy")
    baselines = fit_baselines(dataset, excludes_seen=True)
    fused = fit_baseline_fusion(dataset, baselines, ["co-occurrence", "ease"], excludes_seen=True)
    assert fused.name == "co-occurrence + ease" and fused.valid_ndcg > 0.8
    histories, targets = zip(*(dataset.split(user, "test") for user in dataset.test_users), strict=True)
    assert (fused.ranks(histories, targets, 9, True) == 1).mean() > 0.8
    encoded = baselines.catalogue.encode(histories)
    numbers = baseline_candidates(baselines, fused.names, encoded, True).numbers
    for row, history in enumerate(histories):
        assert not set(baselines.catalogue.encode_items(history)) & set(numbers[row])
