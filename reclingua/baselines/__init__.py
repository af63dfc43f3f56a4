"""Baselines of next-item models, evaluated on the same users as every model.

One baseline a file, all with the interface of `Baseline`: `fit(histories)`, `scores(histories)`. `fit_baselines`
chooses their settings on valid and returns them with the catalogue of item ids. `rates.py` has those of ratings.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reclingua.baselines.base import Baseline, Settings
from reclingua.baselines.co_occurrence import CoOccurrence
from reclingua.baselines.ease import EASE
from reclingua.baselines.histories import Catalogue, Histories
from reclingua.baselines.item_knn import ItemKNN
from reclingua.baselines.popularity import Popularity
from reclingua.baselines.selection import MAX_USERS, fit_best, rank_items, rank_targets
from reclingua.baselines.transition_ease import TransitionEASE
from reclingua.datasets.interactions import InteractionDataset
from reclingua.utils.errors import InputError

NEXT_ITEM_BASELINES: dict[str, type[Baseline]] = {
    kind.name: kind for kind in (Popularity, CoOccurrence, ItemKNN, TransitionEASE, EASE)
}
UNTUNED = ("popularity", "co-occurrence")  # have no settings to choose


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines of one dataset, asked by item ids.

    Args:
        catalogue: numbers of the items.
        models: name -> fitted baseline.
        valid_ndcg: name -> NDCG@10 on valid of the settings that were chosen there.
        left_out: name -> why the baseline was not fitted.
    """

    catalogue: Catalogue
    models: dict[str, Baseline]
    valid_ndcg: dict[str, float]
    left_out: dict[str, str]

    @property
    def popularity(self) -> dict[str, int]:
        """Training interactions of each item."""
        return dict(zip(self.catalogue.items, self.catalogue.counts.tolist(), strict=True))

    def ranks(
        self, histories: Sequence[Sequence[str]], targets: Sequence[str], k: int, excludes_seen: bool
    ) -> dict[str, np.ndarray]:
        """Return name -> rank of each target from 1, int64 [histories]; 0 where it is not in a list of `k` items.

        Args:
            excludes_seen: whether the items of a history are no candidates after it.
        """
        encoded, numbers = self.catalogue.encode(histories), self.catalogue.encode_items(targets)
        ranks = {}
        for name, model in self.models.items():
            ranks[name] = rank_targets(model, encoded, numbers, encoded if excludes_seen else None)
            ranks[name][ranks[name] > k] = 0
        return ranks

    def scores(self, name: str, history: Sequence[str]) -> dict[str, float]:
        """Return the score of every item after one history of item ids, oldest first."""
        (scores,) = self.models[name].scores(self.catalogue.encode([history]))
        return dict(zip(self.catalogue.items, scores.tolist(), strict=True))

    def recommend(self, name: str, history: Sequence[str], k: int, excluded: Collection[str] = ()) -> list[str]:
        """Return the best `k` items after one history that are not in `excluded`, best first."""
        encoded, no_candidates = self.catalogue.encode([history]), self.catalogue.encode([excluded])
        (numbers,) = rank_items(self.models[name], encoded, k, no_candidates)
        return [self.catalogue.items[number] for number in numbers if number >= 0]

    def describe(self) -> dict[str, dict]:
        """Return name -> chosen settings and NDCG@10 on valid, or why it was left out, for a results file."""
        fitted = {
            name: {**model.settings, **({"valid_ndcg@10": self.valid_ndcg[name]} if name in self.valid_ndcg else {})}
            for name, model in self.models.items()
        }
        return fitted | {name: {"left_out": reason} for name, reason in self.left_out.items()}


def fit_baselines(
    dataset: InteractionDataset,
    excludes_seen: bool = False,
    names: Iterable[str] = tuple(NEXT_ITEM_BASELINES),
    settings: Mapping[str, Settings] | None = None,
) -> Baselines:
    """Fit baselines to the training interactions of a dataset, and choose their settings on its valid items.

    Args:
        excludes_seen: whether the items of a history are no candidates after it, on valid as in the test.
        names: of NEXT_ITEM_BASELINES.
        settings: name -> settings that were chosen before, which are taken as they are.

    Raises:
        InputError: a name is unknown.
    """
    catalogue, models, valid_ndcg, left_out = Catalogue(dataset), {}, {}, {}
    histories, targets = valid_parts(dataset, catalogue)
    for name in names:
        if name not in NEXT_ITEM_BASELINES:
            raise InputError(f"baseline {name!r}: should be one of {', '.join(NEXT_ITEM_BASELINES)}")
        kind = NEXT_ITEM_BASELINES[name]
        if reason := kind().reason_against(catalogue.train):
            left_out[name] = reason
        elif settings and name in settings:
            models[name] = kind(settings[name]).fit(catalogue.train)
        else:
            models[name], quality = fit_best(kind, catalogue.train, histories, targets, excludes_seen)
            if quality is not None:
                valid_ndcg[name] = quality
    return Baselines(catalogue, models, valid_ndcg, left_out)


def valid_parts(dataset: InteractionDataset, catalogue: Catalogue) -> tuple[Histories, np.ndarray]:
    """Return the valid histories and targets of up to MAX_USERS users, spread evenly over all."""
    users = dataset.test_users
    step = -(-len(users) // MAX_USERS)
    histories, targets = zip(*(dataset.split(user, "valid") for user in users[::step]), strict=True)
    return catalogue.encode(histories), catalogue.encode_items(targets)
