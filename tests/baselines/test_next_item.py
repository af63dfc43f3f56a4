"""Next-item baselines: slow, obvious versions of each, known results on real data, choice on valid, bad input."""

import json

import numpy as np
import pytest

from reclingua.baselines import NEXT_ITEM_BASELINES, fit_baselines
from reclingua.baselines.base import best_items, target_ranks
from reclingua.baselines.co_occurrence import CoOccurrence
from reclingua.baselines.ease import EASE
from reclingua.baselines.histories import Catalogue, Histories
from reclingua.baselines.item_knn import ItemKNN
from reclingua.baselines.linear import MAX_ITEMS
from reclingua.baselines.selection import fit_best, ndcg, rank_targets
from reclingua.baselines.transition_ease import NEXT, PAST, TransitionEASE
from reclingua.datasets.interactions import open_interactions
from reclingua.utils.errors import InputError

METRICS = ("hit@10", "ndcg@10")


def draw_histories(users=40, items=12, longest=15, seed=0):
    """Random histories as lists, repeats included, one of them empty."""
    draw = np.random.default_rng(seed)
    lists = [draw.integers(items, size=size).tolist() for size in draw.integers(1, longest, users)]
    lists[3] = []
    return lists, flatten(lists, items)


def flatten(lists, items=12):
    values = np.array([item for history in lists for item in history], dtype=np.int64)
    return Histories(values, np.array([len(history) for history in lists]), items)


def test_histories_are_flat_and_can_be_sliced():
    lists, histories = draw_histories()
    assert histories.ages.tolist() == [age for history in lists for age in range(len(history) - 1, -1, -1)]
    part = histories[2:7]
    assert part.items.tolist() == [item for history in lists[2:7] for item in history] and len(part) == 5
    assert len(histories[4:4]) == 0 and len(histories[4:4].items) == 0
    expected = np.zeros((40, 12), np.float32)
    for user, history in enumerate(lists):
        for age, item in enumerate(reversed(history)):
            expected[user, item] += np.exp(-0.3 * age)
    np.testing.assert_allclose(histories.recency_matrix(0.3).toarray(), expected, rtol=1e-6)
    assert set(np.unique(histories.matrix().toarray())) == {0, 1}
    pairs = [(a, b) for history in lists for a, b in zip(history, history[2:], strict=False)]
    assert list(zip(*map(np.ndarray.tolist, histories.pairs(2)), strict=True)) == pairs


def test_co_occurrence_of_a_slow_version():
    lists, histories = draw_histories()
    counts = np.bincount(histories.items, minlength=12)
    scores = CoOccurrence().fit(histories).scores(histories)
    for user, history in enumerate(lists):
        expected = np.zeros(12)
        for rank, item in enumerate(reversed(history[-5:]), start=1):
            for other in lists:
                for place, earlier in enumerate(other):
                    for distance, later in enumerate(other[place + 1 : place + 4], start=1):
                        expected[later] += (earlier == item) / distance / rank / np.sqrt(counts[later])
        np.testing.assert_allclose(scores[user], expected, rtol=1e-6)


def test_item_knn_of_a_slow_version():
    _, histories = draw_histories()
    users = histories.matrix().toarray()
    settings = {"neighbours": 3, "shrink": 2, "decay": 0.4}
    shared = users.T @ users
    norms = np.sqrt(np.diag(shared))
    similarity = shared / (np.outer(norms, norms) + 2)
    np.fill_diagonal(similarity, 0)
    for row in similarity:
        row[row < np.sort(row)[-3]] = 0
    expected = histories.recency_matrix(0.4).toarray() @ similarity
    np.testing.assert_allclose(ItemKNN(settings).fit(histories).scores(histories), expected, rtol=1e-5)


def test_ease_solves_its_problem():
    """The weights of an item are a ridge regression on all other items (section 3.1 of the paper)."""
    _, histories = draw_histories()
    users = histories.matrix().toarray().astype(float)
    model = EASE({"l2": 3.0, "decay": 0.0}).fit(histories)
    for item in range(12):
        others = np.arange(12) != item
        gram = users[:, others].T @ users[:, others] + 3 * np.eye(11)
        expected = np.linalg.solve(gram, users[:, others].T @ users[:, item])
        np.testing.assert_allclose(model.weights[others, item], expected, rtol=1e-4, atol=1e-6)
        assert model.weights[item, item] == 0


def test_transition_ease_of_a_slow_version():
    lists, histories = draw_histories(longest=30)
    past, following = [], []
    for history in lists:
        for place in range(len(history) - 1):
            rows = np.zeros((2, 12))
            for distance, item in enumerate(reversed(history[max(0, place + 1 - PAST) : place + 1])):
                rows[0, item] += np.exp(-0.3 * distance)
            for distance, item in enumerate(history[place + 1 : place + 1 + NEXT]):
                rows[1, item] += np.exp(-0.3 * distance)
            past.append(rows[0])
            following.append(rows[1])
    past, following = np.array(past), np.array(following)
    expected = np.linalg.solve(past.T @ past + 5 * np.eye(12), past.T @ following)
    model = TransitionEASE({"l2": 5.0}).fit(histories)
    np.testing.assert_allclose(model.weights, expected, rtol=1e-3, atol=1e-5)
    last = np.zeros(12)
    for age, item in enumerate(reversed(lists[0][-PAST:])):
        last[item] += np.exp(-0.3 * age)
    np.testing.assert_allclose(model.scores(histories[:1])[0], last @ expected, rtol=1e-3, atol=1e-5)


def test_ranks_and_lists_are_those_of_a_stable_sort():
    draw = np.random.default_rng(0)
    scores = draw.integers(4, size=(30, 9)).astype(np.float32)  # many ties
    scores[draw.random(scores.shape) < 0.3] = -np.inf
    scores[0] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 4, 9, 20):
        for row, numbers in enumerate(best_items(scores, k)):
            expected = [number for number in order[row][:k] if scores[row, number] > -np.inf]
            assert [number for number in numbers if number >= 0] == expected and len(numbers) == min(k, 9)
    targets = draw.integers(9, size=30)
    ranks = [list(order[row]).index(target) + 1 for row, target in enumerate(targets)]
    expected = [rank if scores[row, targets[row]] > -np.inf else 0 for row, rank in enumerate(ranks)]
    assert target_ranks(scores, targets).tolist() == expected


def test_baselines_on_a_ring(toy):
    baselines = fit_baselines(open_interactions(toy, "toy"))
    assert list(baselines.models) == list(NEXT_ITEM_BASELINES)
    for name in ("co-occurrence", "transition-ease", "item-knn"):
        assert baselines.recommend(name, ["3", "4"], 1, {"3", "4"}) == ["5"], name
    best = baselines.recommend("popularity", [], 3)
    assert baselines.recommend("popularity", [], 3, {best[0]})[:2] == best[1:]
    assert sorted(baselines.recommend("co-occurrence", ["3"], 9)) == sorted(baselines.catalogue.items)
    assert baselines.recommend("ease", ["3"], 9, baselines.catalogue.items) == []
    for items in (["x"], ["3", "x"]):
        with pytest.raises(InputError, match="item 'x' is not in toy"):
            baselines.recommend("ease", items, 3)
    with pytest.raises(InputError, match="baseline 'slim': should be one of popularity, co-occurrence"):
        fit_baselines(open_interactions(toy, "toy"), names=["slim"])


def test_models_are_fitted_to_training_interactions_only(toy, edit):
    def lists():
        settings = {name: {} for name in NEXT_ITEM_BASELINES}
        baselines = fit_baselines(open_interactions(toy, "toy"), settings=settings)
        return [baselines.recommend(name, ["3"], 9) for name in baselines.models]

    before = lists()
    edit("inter", lambda inter: {user: [*history[:-2], 0, 0] for user, history in inter.items()})
    assert before == lists()


def test_the_best_on_valid_is_chosen_and_test_items_are_not_looked_at(toy, edit):
    dataset = open_interactions(toy, "toy")
    chosen = fit_baselines(dataset, excludes_seen=True)
    catalogue = Catalogue(dataset)
    histories, targets = zip(*(dataset.split(user, "valid") for user in dataset.test_users), strict=True)
    encoded, numbers = catalogue.encode(histories), catalogue.encode_items(targets)
    model, quality = fit_best(ItemKNN, catalogue.train, encoded, numbers, True)
    tried = []
    for neighbours in ItemKNN.FIT_GRID["neighbours"]:
        for shrink in ItemKNN.FIT_GRID["shrink"]:
            for decay in ItemKNN.SCORE_GRID["decay"]:
                settings = {"neighbours": neighbours, "shrink": shrink, "decay": decay}
                other = ItemKNN(settings).fit(catalogue.train)
                tried.append(ndcg(rank_targets(other, encoded, numbers, encoded)))
    assert quality == max(tried) and ndcg(rank_targets(model, encoded, numbers, encoded)) == quality
    assert chosen.describe()["item-knn"] == {**model.settings, "valid_ndcg@10": quality}
    edit("inter", lambda inter: {user: [*history[:-1], 0] for user, history in inter.items()})
    assert fit_baselines(open_interactions(toy, "toy"), excludes_seen=True).describe() == chosen.describe()


def test_seen_targets_are_misses_and_lists_are_cut(toy):
    baselines = fit_baselines(open_interactions(toy, "toy"), names=["popularity"])
    order = baselines.catalogue.items
    ranks = baselines.ranks([[order[0]], [order[0]], [order[0]]], [order[0], order[1], order[5]], 4, True)
    assert ranks["popularity"].tolist() == [0, 1, 0]
    ranks = baselines.ranks([[order[0]], [order[0]], [order[0]]], [order[0], order[1], order[5]], 9, False)
    assert ranks["popularity"].tolist() == [1, 2, 6]


def test_too_many_items_are_left_out_with_the_reason(toy, edit):
    edit("item", lambda items: items | {str(number): {"title": "x"} for number in range(9, MAX_ITEMS + 5)})
    baselines = fit_baselines(open_interactions(toy, "toy"), names=["ease", "popularity"])
    assert list(baselines.models) == ["popularity"]
    assert "20,005 items" in baselines.describe()["ease"]["left_out"]


def test_results_on_ml_100k(ml_100k):
    """Popularity, co-occurrence and EASE as two independent implementations have them, seen items excluded."""
    dataset = open_interactions(ml_100k, "ml-100k")
    histories, targets = zip(*(dataset.split(user, "test") for user in dataset.test_users), strict=True)
    baselines = fit_baselines(dataset, excludes_seen=True, names=["popularity", "co-occurrence", "ease"])
    known = {"popularity": (0.087, 0.045), "co-occurrence": (0.177, 0.091), "ease": (0.2047, 0.1089)}
    for name, ranks in baselines.ranks(histories, targets, 20, True).items():
        hit, expected = np.mean((ranks > 0) & (ranks <= 10)), known[name]
        assert (hit, ndcg(ranks)) == pytest.approx(expected, abs=5e-4), name
    assert baselines.describe()["ease"] == json.loads(json.dumps(baselines.describe()["ease"]))
