"""Metrics against the reference's numbers; baselines against known ones."""

import json

import pytest

from baselines import CoOccurrence, Popularity
from data.dataset import open_dataset
from errors import InputError
from metrics import parse_metrics, ranking_metrics


def test_hit_and_ndcg_agree_with_the_reference(shared):
    golden = json.loads((shared / "golden" / "metrics.json").read_text())["ranking"]
    places = golden["rank_of_target"]
    lists = [["target" if at == place else f"{at}" for at in range(golden["beams"])] for place in places]
    names = parse_metrics(",".join(golden["metrics"]))
    assert ranking_metrics(lists, ["target"] * len(lists), names) == pytest.approx(golden["metrics"], abs=1e-12)


def test_a_list_may_be_short_or_empty():
    results = ranking_metrics([["a"], [], ["b", "a"]], ["a", "a", "a"], [("hit", 1), ("hit", 5), ("ndcg", 5)])
    assert results == pytest.approx({"hit@1": 1 / 3, "hit@5": 2 / 3, "ndcg@5": (1 + 0.63092975) / 3})


@pytest.mark.parametrize("names", ["hit", "hit@0", "recall@5", "hit@x", ""])
def test_unknown_metrics(names):
    with pytest.raises(InputError, match="should be hit@k or ndcg@k"):
        parse_metrics(names)


def test_baselines_on_a_ring(toy):
    dataset = open_dataset(toy, "toy")
    assert CoOccurrence(dataset).recommend(["3", "4"], 1, {"3", "4"}) == ["5"]
    popularity = Popularity(dataset)
    best = popularity.recommend([], 3, set())
    assert popularity.recommend([], 3, {best[0]})[:2] == best[1:]
    everything = CoOccurrence(dataset).recommend(["3"], 9, set())
    assert sorted(everything) == sorted(dataset.item_ids)


def test_baselines_know_training_interactions_only(toy, edit):
    before = [b(open_dataset(toy, "toy")).recommend(["3"], 9, set()) for b in (Popularity, CoOccurrence)]
    edit("inter", lambda inter: {user: [*history[:-2], 0, 0] for user, history in inter.items()})
    assert before == [b(open_dataset(toy, "toy")).recommend(["3"], 9, set()) for b in (Popularity, CoOccurrence)]


def test_baselines_of_ml_100k(ml_100k):
    """The figures of two independent measurements of the same split, seen items excluded."""
    dataset = open_dataset(ml_100k, "ml-100k")
    histories, targets = zip(*(dataset.split(user, "test") for user in dataset.test_users), strict=True)
    for baseline, hit, ndcg in ((Popularity(dataset), 0.087, 0.045), (CoOccurrence(dataset), 0.177, 0.091)):
        lists = [baseline.recommend(history, 10, set(history)) for history in histories]
        results = ranking_metrics(lists, targets, [("hit", 10), ("ndcg", 10)])
        assert results == pytest.approx({"hit@10": hit, "ndcg@10": ndcg}, abs=5e-4)
