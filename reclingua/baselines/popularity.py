"""Popularity: items by their number of training interactions."""

from collections import Counter

from reclingua.datasets.interactions import RecDataset


class Popularity:
    """Items by their number of training interactions, the same list for everybody."""

    def __init__(self, dataset: RecDataset):
        self.counts = Counter(item for user in dataset.histories for item in dataset.train_history(user))
        self.ranked = sorted(dataset.item_ids, key=lambda item: -self.counts[item])

    def scores(self, history: list[str]) -> Counter:
        """Item -> score, 0 for those that are not there; `history` plays no part."""
        return self.counts

    def recommend(self, history: list[str], k: int, excluded: set[str]) -> list[str]:
        """The first `k` items not in `excluded`; `history` plays no part."""
        best = []
        for item in self.ranked:
            if len(best) == k:
                break
            if item not in excluded:
                best.append(item)
        return best
