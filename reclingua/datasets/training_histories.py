"""Fingerprints of training histories, by which a test on other histories finds targets that were trained on.

A checkpoint stores for each user how many items the training read, and a fingerprint of them, never the items.
"""

from collections.abc import Mapping, Sequence

from reclingua.datasets.interactions import InteractionDataset
from reclingua.utils.provenance import fingerprint


def training_fingerprints(dataset: InteractionDataset) -> dict[str, list]:
    """Return user -> [number of training items, fingerprint of them, 16 hexadecimal digits]."""
    return {user: _summarize(items) for user, items in dataset.train_histories.items()}


def count_trained_targets(dataset: InteractionDataset, users: Sequence[str], trained: Mapping[str, list]) -> int:
    """Return how many of these test users have a target that can be an item that a model was trained on.

    A target is new if the history begins with all the training items of the user, and the target comes after them, or
    if the training did not know the user.

    Args:
        trained: `training_fingerprints` of the training; empty: unknown, all targets count.
    """
    if not trained:
        return len(users)
    count = 0
    for user in users:
        history, _ = dataset.split(user, "test")
        length = trained[user][0] if user in trained else 0
        count += length > len(history) or length > 0 and _summarize(history[:length]) != trained[user]
    return count


def _summarize(items: list[str]) -> list:
    return [len(items), fingerprint(items)[:16]]
