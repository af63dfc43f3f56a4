"""Metrics of cold and warm targets, next to a random ranking and text neighbours."""

import numpy as np
import pytest

from reclingua.baselines.histories import Histories
from reclingua.baselines.text_neighbours import TextNeighbours
from reclingua.metrics import metrics_of_ranks
from reclingua.reporting.cold_items import cold_item_metrics, random_metrics

NAMES = [("hit", 1), ("hit", 5), ("ndcg", 5)]


def test_random_metrics_are_those_of_all_rankings():
    """A random ranking has each rank from 1 to the number of candidates equally often."""
    num_candidates = [3, 5, 20, 0]
    every = [metrics_of_ranks(np.arange(1, number + 1), NAMES) for number in num_candidates[:3]]
    expected = {name: sum(metrics[name] for metrics in every) / 4 for name in every[0]}
    assert random_metrics(np.array(num_candidates), NAMES) == pytest.approx(expected)


def test_cold_targets_are_those_without_training_interactions():
    details = {"target_popularity": [0, 3, 0], "ranks": [[1, 0, 2], [0, 0, 0]], "method": "lcrec"}
    details |= {"baselines": {"popularity": [0, 1, 0]}, "fused": {}}
    parts = cold_item_metrics(details, [4, 4, 4], [("hit", 1)])
    assert {part: content["targets"] for part, content in parts.items()} == {"warm": 1, "cold": 2}
    assert parts["cold"]["rows"] == {"random": {"hit@1": 0.25}, "popularity": {"hit@1": 0}, "lcrec": {"hit@1": 0.5}}
    assert parts["warm"]["rows"]["popularity"] == {"hit@1": 1}
    assert cold_item_metrics(details | {"target_popularity": [1, 1, 1]}, [4, 4, 4], NAMES) == {}


def test_text_neighbours_rank_by_shared_words():
    baseline = TextNeighbours(["red toy car", "blue toy car", "green soap", "soap, red", "!"])
    histories = Histories(np.array([0, 2]), np.array([1, 1]), 5)
    first, second = baseline.fit(histories).scores(histories)
    assert np.argsort(-first).tolist()[:3] == [0, 1, 3] and first[2] == first[4] == 0
    assert np.argsort(-second).tolist()[:2] == [2, 3] and second[0] == 0
    assert not TextNeighbours(["", "!"]).scores(Histories(np.array([0]), np.array([1]), 2)).any()
