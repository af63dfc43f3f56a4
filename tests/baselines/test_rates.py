"""Like-rates: values by hand, the published split of MovieLens-1M."""

import numpy as np
import pytest

from reclingua.baselines.rates import LikeRates
from reclingua.datasets.ratings import open_ratings, to_numpy
from reclingua.metrics.roc import auc, uauc
from tests.helpers.toys import write_preferences


def test_rates_are_smoothed_counts(tmp_path):
    write_preferences(tmp_path)
    dataset = open_ratings(tmp_path, "liked")
    test = dataset.parts["test"]
    for parts, rates in (
        (("train",), LikeRates(dataset)),
        (("train", "valid"), LikeRates(dataset, counts_valid=True)),
    ):
        columns = {
            name: np.concatenate([to_numpy(dataset.parts[part], name) for part in parts])
            for name in ("uid", "iid", "label")
        }
        mean, scores = columns["label"].mean(), rates.scores(test)
        for row in (0, len(test) - 1):  # the last user is cold
            expected = []
            for name in ("iid", "uid"):
                mine = columns["label"][columns[name] == test[row][name]]
                expected.append((mine.sum() + 5 * mean) / (len(mine) + 5))
            assert scores["item like-rate"][row] == pytest.approx(expected[0])
            assert scores["user like-rate"][row] == pytest.approx(expected[1])
            assert scores["like-rates"][row] == pytest.approx(sum(expected) / 2)
            odds = np.exp(rates.log_odds(test)[row])
            np.testing.assert_allclose(odds / (1 + odds), expected)
        assert scores["popularity"][0] == (columns["iid"] == test[0]["iid"]).sum()


def test_like_rates_of_ml_1m(shared):
    dataset = open_ratings(shared / "data", "ml-1m")
    test = dataset.parts["test"]
    scores = LikeRates(dataset).scores(test)["like-rates"]
    users, labels = to_numpy(test, "uid"), to_numpy(test, "label")
    assert auc(labels, scores) == pytest.approx(0.7317, abs=5e-4)
    assert uauc(users, labels, scores)["uauc"] == pytest.approx(0.6816, abs=5e-4)
