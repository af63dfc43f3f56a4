"""Metrics compared with the reference implementation and scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from reclingua.metrics import load_metric, metrics_of_ranks, parse_metrics, ranking_metrics
from reclingua.metrics.roc import auc, auc_of_groups, uauc
from reclingua.utils.errors import InputError


def test_hit_and_ndcg_agree_with_the_reference(shared):
    golden = json.loads((shared / "golden" / "metrics.json").read_text())["ranking"]
    ranks = golden["rank_of_target"]
    lists = [["target" if index == rank else f"{index}" for index in range(golden["beams"])] for rank in ranks]
    names = parse_metrics(",".join(golden["metrics"]))
    assert ranking_metrics(lists, ["target"] * len(lists), names) == pytest.approx(golden["metrics"], abs=1e-12)


def test_ranked_lists_can_be_short_or_empty():
    results = ranking_metrics([["a"], [], ["b", "a"]], ["a", "a", "a"], [("hit", 1), ("hit", 5), ("ndcg", 5)])
    assert results == pytest.approx({"hit@1": 1 / 3, "hit@5": 2 / 3, "ndcg@5": (1 + 0.63092975) / 3})


@pytest.mark.parametrize("names", ["hit", "hit@0", "recall@5", "hit@x", ""])
def test_unknown_metrics(names):
    with pytest.raises(InputError, match="should be hit@k or ndcg@k"):
        parse_metrics(names)


def test_metrics_of_ranks_are_those_of_lists():
    lists, targets = [["a"], [], ["b", "a"], ["c", "b", "a"]], ["a"] * 4
    names = [("hit", 1), ("hit", 2), ("ndcg", 3)]
    assert metrics_of_ranks(np.array([1, 0, 2, 3]), names) == pytest.approx(ranking_metrics(lists, targets, names))


def test_auc_and_uauc_agree_with_the_reference(shared):
    golden = json.loads((shared / "golden" / "metrics.json").read_text())["preference"]
    users, labels, scores = (np.array(golden[name]) for name in ("user", "label", "score"))
    results = uauc(users, labels, scores)
    assert auc(labels, scores) == pytest.approx(golden["auc"], abs=1e-9)
    assert results["uauc"] == pytest.approx(golden["uauc"], abs=1e-9)
    assert results["users_counted"] == golden["users_counted"]
    assert results["users_counted"] + results["users_left_out"] == len(set(golden["user"]))


@pytest.mark.parametrize("seed", range(5))
def test_auc_of_groups_matches_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    users = rng.choice(["ann", "bob", "eve", "zoë"] + [f"user {i}" for i in range(60)], 400)
    labels = rng.integers(0, 2, 400)
    scores = rng.choice([-np.inf, -1e300, -1.5, 0.0, -0.0, 1e-300, 2.0, np.inf], 400)
    names, aucs = auc_of_groups(users, labels, scores)
    assert names.tolist() == sorted(set(users))
    for name, value in zip(names, aucs, strict=True):
        mask = users == name
        if len(set(labels[mask])) < 2:
            assert np.isnan(value)
        else:
            finite = np.clip(scores[mask], -1e301, 1e301)  # scikit-learn rejects infinity
            assert value == pytest.approx(roc_auc_score(labels[mask], finite), abs=1e-12)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, np.clip(scores, -1e301, 1e301)), abs=1e-12)


def test_auc_and_uauc_as_evaluate_modules():
    labels, scores, users = [1, 0, 1, 0, 1], [0.9, 0.1, 0.2, 0.2, 0.3], [7, 7, 8, 8, 9]
    assert load_metric("auc").compute(references=labels, prediction_scores=scores)["auc"] == pytest.approx(5.5 / 6)
    results = load_metric("uauc").compute(references=labels, prediction_scores=scores, users=users)
    assert results == {"uauc": 0.75, "users_counted": 2, "users_left_out": 1}
    close = [0.1 + 1e-15, 0.1]  # float32 would make them tie
    assert load_metric("auc").compute(references=[1, 0], prediction_scores=close)["auc"] == 1


def test_labels_of_evaluate_modules_are_not_rounded():
    with pytest.raises(InputError, match="sample 0 has label 0.7"):
        load_metric("auc").compute(references=[0.7, 1, 0], prediction_scores=[0.1, 0.2, 0.3])


def test_uauc_is_nan_if_no_user_has_both_labels():
    results = uauc(np.array([1, 2]), np.array([1, 0]), np.array([0.5, 0.5]))
    assert np.isnan(results.pop("uauc")) and results == {"users_counted": 0, "users_left_out": 2}
    assert np.isnan(auc(np.array([1, 1]), np.array([0.1, 0.2])))


BAD_SCORES = {
    "NaN": ([0.1, np.nan], [0, 1], "1 of 2 scores are NaN, the first that of sample 1"),
    "label": ([0.1, 0.2], [0, 2], "sample 1 has label 2"),
    "lengths": ([0.1], [0, 1], "lengths should be equal"),
    "nothing": ([], [], "no samples"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_invalid_scores_are_rejected(case):
    scores, labels, message = BAD_SCORES[case]
    with pytest.raises(InputError, match=message):
        auc(np.array(labels), np.array(scores))
    with pytest.raises(InputError, match=message):
        uauc(np.zeros(len(labels)), np.array(labels), np.array(scores))
