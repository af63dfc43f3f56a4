"""Co-occurrence baseline: items that followed the user's latest items in other histories."""

from collections import defaultdict
from collections.abc import Mapping

from reclingua.baselines.popularity import Popularity
from reclingua.datasets.interactions import InteractionDataset

WINDOW = 3  # largest distance of two items that count as co-occurring
RECENT = 5  # number of a user's latest items that vote


class CoOccurrence:
    """Recommender by first-order co-occurrence: candidates followed the user's latest items in other histories.

    A training pair (earlier, later) at most WINDOW places apart weighs 1 / distance, summed over all histories:

        weight(a -> c) = sum over pairs (a, c) of 1 / distance
        score(c)       = sum over the RECENT latest items a of weight(a -> c) / recency rank of a / sqrt(count(c))

    Items that never followed any of the latest ones come last, by popularity.
    """

    def __init__(self, dataset: InteractionDataset):
        self.popularity = Popularity(dataset)
        self.counts = self.popularity.counts
        # item -> later item -> weight
        self.followers: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        for user in dataset.histories:
            history = dataset.train_history(user)
            for index, earlier in enumerate(history, start=1):
                for distance, later in enumerate(history[index : index + WINDOW], start=1):
                    self.followers[earlier][later] += 1 / distance

    def scores(self, history: list[str]) -> Mapping[str, float]:
        """Return item -> score after `history`, oldest first; 0 for missing items."""
        scores: defaultdict[str, float] = defaultdict(float)
        for rank, item in enumerate(reversed(history[-RECENT:]), start=1):
            for candidate, weight in self.followers.get(item, {}).items():
                scores[candidate] += weight / rank / self.popularity.counts[candidate] ** 0.5
        return scores

    def recommend(self, history: list[str], k: int, excluded: set[str]) -> list[str]:
        """Return the best `k` items that are not in `excluded` for a user with `history`, oldest first."""
        scores = self.scores(history)
        best = sorted((item for item in scores if item not in excluded), key=lambda item: -scores[item])[:k]
        return best + self.popularity.recommend(history, k - len(best), excluded | set(best))
