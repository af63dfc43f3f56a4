"""Baselines without training, evaluated on the same users as every model.

One baseline a file, all with one interface: `Baseline(dataset)` counts the training interactions, `scores(history)`
returns item -> score, and `recommend(history, k, excluded)` the best items.
"""

from reclingua.baselines.co_occurrence import CoOccurrence
from reclingua.baselines.popularity import Popularity
from reclingua.datasets.interactions import InteractionDataset


def fit_baselines(dataset: InteractionDataset) -> dict[str, Popularity | CoOccurrence]:
    """Fit all baselines on the training interactions of a dataset; name -> baseline."""
    co_occurrence = CoOccurrence(dataset)
    return {"popularity": co_occurrence.popularity, "co-occurrence": co_occurrence}
