"""Popularity baseline: items ranked by their number of training interactions."""

from collections import Counter
from collections.abc import Mapping

from reclingua.datasets.interactions import InteractionDataset


class Popularity:
    """Recommender that ranks items by their number of training interactions, the same list for every user."""

    def __init__(self, dataset: InteractionDataset):
        self.counts = Counter(item for user in dataset.histories for item in dataset.train_history(user))
        self.ranked = sorted(dataset.item_ids, key=lambda item: -self.counts[item])

    def scores(self, history: list[str]) -> Mapping[str, float]:
        """Return item -> score, 0 for missing items; `history` is ignored."""
        return self.counts

    def recommend(self, history: list[str], k: int, excluded: set[str]) -> list[str]:
        """Return the best `k` items that are not in `excluded`; `history` is ignored."""
        best: list[str] = []
        for item in self.ranked:
            if len(best) == k:
                break
            if item not in excluded:
                best.append(item)
        return best
