"""Baselines without training, measured beside every model on the same users."""

from reclingua.baselines.co_occurrence import CoOccurrence
from reclingua.baselines.popularity import Popularity
from reclingua.datasets.interactions import RecDataset


def fit_baselines(dataset: RecDataset) -> dict[str, Popularity | CoOccurrence]:
    """Both, by name."""
    co_occurrence = CoOccurrence(dataset)
    return {"popularity": co_occurrence.popularity, "co-occurrence": co_occurrence}
