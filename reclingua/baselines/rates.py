"""Like-rates: baselines of ratings, which know how often an item and a user were liked in the training ratings."""

import numpy as np
from datasets import Dataset

from reclingua.datasets.rates import SMOOTHING
from reclingua.datasets.ratings import RatingsDataset, to_numpy

RATES = ("popularity", "user like-rate", "item like-rate", "like-rates")


class LikeRates:
    """Smoothed like-rates of items and users: (liked + SMOOTHING x mean) / (ratings + SMOOTHING).

    Args:
        dataset: its training ratings are counted.
        counts_valid: whether the valid ratings are counted, too: all that is known before the test period.
    """

    def __init__(self, dataset: RatingsDataset, counts_valid: bool = False):
        parts = [dataset.parts[name] for name in (("train", "valid") if counts_valid else ("train",))]
        labels = np.concatenate([to_numpy(part, "label") for part in parts]).astype(np.float64)
        self.mean = labels.mean()
        self.rates, self.counts = {}, {}
        for name, size in (("uid", dataset.num_users), ("iid", dataset.num_items)):
            ids = np.concatenate([to_numpy(part, name) for part in parts])
            self.counts[name] = np.bincount(ids, minlength=size)
            liked = np.bincount(ids, weights=labels, minlength=size)
            self.rates[name] = (liked + SMOOTHING * self.mean) / (self.counts[name] + SMOOTHING)

    def scores(self, part: Dataset) -> dict[str, np.ndarray]:
        """Return the baselines RATES of rows of ratings, each float64 [rows]; "like-rates" is the mean of both rates.

        Popularity is the number of ratings of the item.
        """
        user, item = (self.rates[name][to_numpy(part, name)] for name in ("uid", "iid"))
        popularity = self.counts["iid"][to_numpy(part, "iid")].astype(np.float64)
        return dict(zip(RATES, (popularity, user, item, (user + item) / 2), strict=True))

    def log_odds(self, part: Dataset) -> np.ndarray:
        """Return the log-odds of the like-rates of item and user, float64 [rows, 2]."""
        rates = np.stack([self.rates[name][to_numpy(part, name)] for name in ("iid", "uid")], axis=1)
        return np.log(rates) - np.log1p(-rates)
