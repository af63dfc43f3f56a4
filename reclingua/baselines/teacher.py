"""EASE as a teacher of a language model: its probabilities of the next item, as soft labels of semantic-ID tokens.

A next item tells nothing of the other items that would have been as good; EASE knows them. The loss of a semantic-ID
token becomes (Hinton et al., 2015; arXiv 1503.02531)

    (1 - weight) x cross-entropy(token of the target) + weight x cross-entropy(probabilities of the teacher)

where the teacher's probability of a code is that of all items that begin with the target's codes so far and this one:

    items  <a_1><b_1> .1   <a_1><b_2> .3   <a_2><b_1> .6        target <a_1><b_2>
    level 1                a_1 .4  a_2 .6
    level 2, after a_1     b_1 .25 b_2 .75
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from reclingua.baselines import fit_baselines, valid_parts
from reclingua.baselines.ease import EASE
from reclingua.baselines.histories import Histories
from reclingua.datasets.interactions import InteractionDataset
from reclingua.utils.errors import InputError

MAX_SHARPNESS = 10.0  # of the softmax over scores with standard deviation 1
FIT_USERS = 1000  # of valid, for the sharpness


class EASETeacher:
    """Soft labels for the tokens of each target in a history.

    EASE's settings, and the sharpness of the softmax over its standardised scores, are chosen on valid. It knows the
    whole history before the target, and training interactions alone.

    Args:
        token_ids: item -> semantic ID as token ids, all of one length.
        weight: of the soft labels, above 0 and up to 1.
        excludes_seen: items of the history have probability 0.

    Raises:
        InputError: there are too many items for EASE, or semantic IDs of several lengths.
    """

    def __init__(
        self, dataset: InteractionDataset, token_ids: Mapping[str, list[int]], weight: float, excludes_seen: bool
    ):
        baselines = fit_baselines(dataset, excludes_seen, ["ease"])
        if "ease" in baselines.left_out:
            raise InputError(f"--distill_weight: {dataset.name} has {baselines.left_out['ease']}")
        self.catalogue, ease = baselines.catalogue, baselines.models["ease"]
        assert isinstance(ease, EASE)
        self.weights, self.decay = ease.weights, float(np.exp(-ease.settings["decay"]))
        self.weight, self.excludes_seen = weight, excludes_seen
        codes = [token_ids[item] for item in self.catalogue.items]
        if len(set(map(len, codes))) > 1:
            raise InputError(f"--distill_weight: semantic IDs of {dataset.name} have several lengths; give them one")
        self.tokens = np.unique(codes)  # int64 [codes]: what the columns of soft labels stand for
        self._sort(np.searchsorted(self.tokens, codes))
        histories, targets = valid_parts(dataset, self.catalogue)
        self.sharpness = self._fit_sharpness(histories[:FIT_USERS], targets[:FIT_USERS])

    def soft_labels(self, history: Sequence[str], first: int, last: int) -> np.ndarray:
        """Return the soft labels of the tokens of items `first` to `last` - 1 of a history, one item after another.

        Returns:
            float32 [(last - first) x levels, codes]. A row adds up to `weight`, or is 0 where the teacher excludes
            all items with the target's codes so far.
        """
        numbers = self.catalogue.encode([history[:last]]).items
        sums = self._sums_of_prefixes(self._probabilities(numbers, first))
        targets = numbers[first:]
        labels = np.zeros((len(targets), len(sums), len(self.tokens)), np.float32)
        for level, of_level in enumerate(sums):
            starts, stops = self.children[level][0][targets], self.children[level][1][targets]
            counts = stops - starts
            rows = np.repeat(np.arange(len(targets)), counts)
            nodes = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
            values = of_level[rows, nodes]
            totals = np.bincount(rows, values, len(targets))
            scales = np.divide(self.weight, totals, out=np.zeros(len(targets)), where=totals > 1e-12)
            labels[rows, level, self.columns[level][nodes]] = values * scales[rows]
        return labels.reshape(-1, len(self.tokens))

    def _sort(self, codes: np.ndarray) -> None:
        """Order the items by semantic ID, so that the items of a prefix are neighbours, and its children as well.

        order               int64 [items]: item numbers in that order
        starts[level]       int64 [prefixes of level + 1 codes]: place of the first item of each
        columns[level]      int64 [prefixes of level + 1 codes]: the last code of each, a column of soft labels
        children[level]     int64 [items], twice: first and behind last prefix among which level's code chooses
        """
        self.order = np.lexsort(codes.T[::-1])
        codes = codes[self.order]
        is_new = np.zeros(len(codes), bool)
        is_new[0] = True
        self.starts, self.columns, self.children = [], [], []
        parents = np.array([0])  # places of the first item of each prefix that is one code shorter
        for level in range(codes.shape[1]):
            is_new[1:] |= codes[1:, level] != codes[:-1, level]
            starts = np.flatnonzero(is_new)
            bounds = np.append(np.searchsorted(starts, parents), len(starts))
            of_item = np.searchsorted(parents, np.arange(len(codes)), side="right") - 1  # parent of each place
            children = np.empty((2, len(codes)), np.int64)
            children[:, self.order] = bounds[of_item], bounds[of_item + 1]
            self.starts.append(starts)
            self.columns.append(codes[starts, level])
            self.children.append(children)
            parents = starts

    def _probabilities(self, numbers: np.ndarray, first: int) -> np.ndarray:
        """Return the probabilities of all items at each place of a history from `first` on, float [places, items]."""
        scores = np.empty((len(numbers) - first, len(self.weights)), np.float32)
        ages = np.arange(first - 1, -1, -1)
        score = (self.decay**ages).astype(np.float32) @ self.weights[numbers[:first]]
        for place in range(len(scores)):
            scores[place] = score
            score = score * self.decay + self.weights[numbers[first + place]]
        seen = np.zeros(scores.shape, bool)
        if self.excludes_seen:
            seen[:, numbers[:first]] = True
            for place, number in enumerate(numbers[first:-1], start=1):
                seen[place:, number] = True
        return softmax(self.sharpness * standardise(scores, seen), seen)

    def _sums_of_prefixes(self, probabilities: np.ndarray) -> list[np.ndarray]:
        """Return for each level the probability of each prefix, float32 [places, prefixes of level + 1 codes]."""
        ordered = probabilities[:, self.order]
        return [np.add.reduceat(ordered, starts, axis=1) for starts in self.starts]

    def _fit_sharpness(self, histories: Histories, targets: np.ndarray) -> float:
        """Return the sharpness with the largest likelihood of valid targets."""
        scores = histories.recency_matrix(-np.log(self.decay)) @ self.weights
        seen = histories.matrix().toarray() > 0 if self.excludes_seen else np.zeros(scores.shape, bool)
        rows = np.flatnonzero(~seen[np.arange(len(targets)), targets])
        scores, seen, targets = standardise(scores, seen)[rows], seen[rows], targets[rows]

        def mean_loss(sharpness: float) -> float:
            return -np.log(softmax(sharpness * scores, seen)[np.arange(len(rows)), targets] + 1e-12).mean()

        return float(minimize_scalar(mean_loss, bounds=(0, MAX_SHARPNESS), method="bounded").x) if len(rows) else 1.0


def standardise(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return scores [rows, items] with mean 0 and variance 1 over the items that are not `seen` [rows, items]."""
    counts = np.maximum((~seen).sum(1, keepdims=True), 1)
    centred = scores - np.where(seen, 0, scores).sum(1, keepdims=True) / counts
    deviations = np.sqrt((np.where(seen, 0, centred) ** 2).sum(1, keepdims=True) / counts)
    return centred / np.maximum(deviations, 1e-9)


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return probabilities [rows, items], 0 for `seen` items; a row of zeros where all are seen."""
    scores = np.where(seen, -np.inf, scores)
    largest = scores.max(1, keepdims=True)
    exponentials = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    return exponentials / np.maximum(exponentials.sum(1, keepdims=True), 1e-30)
