"""Test targets that a checkpoint was trained on are found on other histories, by fingerprints alone."""

from dataclasses import replace

import pytest

from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.training_histories import count_trained_targets, training_fingerprints


@pytest.fixture
def dataset(toy):
    return open_interactions(toy, "toy")


def count(dataset, change):
    histories = {user: items for user, history in dataset.histories.items() if (items := change(user, history))}
    other = replace(dataset, histories=histories)
    return count_trained_targets(other, other.test_users, training_fingerprints(dataset)), len(other.test_users)


def test_targets_of_the_same_histories_are_new(dataset):
    assert count(dataset, lambda user, history: history) == (0, 12)


@pytest.mark.parametrize(
    "change, number",
    [
        (lambda user, history: history[:-2], 12),  # the last training item becomes the target
        (lambda user, history: history[:-1], 0),  # the valid item does, which training did not read
        (lambda user, history: [*history, "8"], 0),  # a later interaction
        (lambda user, history: history if user < "5" else None, 0),  # fewer users
        (lambda user, history: history[1:], 12),  # the first items are cut: no training history is recognised
        (lambda user, history: history[::-1], 12),
    ],
)
def test_other_histories(dataset, change, number):
    assert count(dataset, change)[0] == number


def test_users_with_new_numbers_are_not_taken_for_others(dataset):
    others = dict(zip(dataset.histories, [*list(dataset.histories.values())[1:], ["0", "1", "2", "3"]], strict=True))
    number, users = count(dataset, lambda user, _: others[user])
    assert number == users == 12


def test_users_unknown_to_training_and_missing_fingerprints(dataset):
    other = replace(dataset, histories={f"new {user}": items for user, items in dataset.histories.items()})
    assert count_trained_targets(other, other.test_users, training_fingerprints(dataset)) == 0
    assert count_trained_targets(dataset, dataset.test_users, {}) == 12


def test_fingerprints_hold_no_items(dataset):
    fingerprints = training_fingerprints(dataset)
    assert fingerprints.keys() == dataset.histories.keys()
    assert all(length == len(dataset.train_history(user)) for user, (length, _) in fingerprints.items())
    assert all(len(digest) == 16 for _, digest in fingerprints.values())
