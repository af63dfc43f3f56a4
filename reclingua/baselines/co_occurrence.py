"""Two recommenders that learn nothing, measured beside every model on the same users."""

from collections import Counter, defaultdict

from reclingua.baselines.popularity import Popularity
from reclingua.datasets.interactions import RecDataset

WINDOW = 3  # how far apart two items may be to count as co-occurring
RECENT = 5  # how many of a user's last items speak


class CoOccurrence:
    """First-order co-occurrence: what followed the user's last items in other histories, near ones more.

    A training pair (earlier, later) at most three places apart weighs 1 / distance. A candidate scores the sum over
    the user's last five items of its weight / (recency rank), over the square root of its popularity. Items that never
    followed any of those come after, by popularity.
    """

    def __init__(self, dataset: RecDataset):
        self.popularity = Popularity(dataset)
        self.followers: dict[str, Counter] = defaultdict(Counter)
        for user in dataset.histories:
            history = dataset.train_history(user)
            for at, earlier in enumerate(history):
                for distance, later in enumerate(history[at + 1 : at + 1 + WINDOW], start=1):
                    self.followers[earlier][later] += 1 / distance

    def scores(self, history: list[str]) -> Counter:
        """Item -> score after `history`, oldest first; 0 for those that are not there."""
        scores = Counter()
        for rank, item in enumerate(reversed(history[-RECENT:]), start=1):
            for candidate, weight in self.followers.get(item, {}).items():
                scores[candidate] += weight / rank / self.popularity.counts[candidate] ** 0.5
        return scores

    def recommend(self, history: list[str], k: int, excluded: set[str]) -> list[str]:
        """The best `k` items not in `excluded` for a user with `history`, oldest first."""
        scores = self.scores(history)
        best = sorted((item for item in scores if item not in excluded), key=lambda item: -scores[item])[:k]
        return best + self.popularity.recommend(history, k - len(best), excluded | set(best))
