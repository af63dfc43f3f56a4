"""Resolve collisions of semantic IDs: reassign colliding items by Sinkhorn, then move the rest to free codes."""

import math
from collections import Counter, defaultdict

import numpy as np
import torch

from index.codes import check_sizes
from index.rqvae import RQVAE, sinkhorn, squared_distances
from reclingua.utils.errors import InputError


def collision_groups(codes: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each semantic ID that several items share; codes int64 [items, levels]."""
    rows_of = defaultdict(list)
    for row, semantic_id in enumerate(map(tuple, codes.tolist())):
        rows_of[semantic_id].append(row)
    return [np.array(rows) for rows in rows_of.values() if len(rows) > 1]


def count_collisions(codes: np.ndarray) -> int:
    """Count the items that share their semantic ID with another item."""
    return sum(map(len, collision_groups(codes)))


@torch.no_grad()
def reassign_by_sinkhorn(model: RQVAE, latents: torch.Tensor, codes: np.ndarray, rounds: int = 20) -> np.ndarray:
    """Reassign the last code of colliding items by Sinkhorn within each group, up to `rounds` times (LC-Rec).

    Within a group all items have the same first codes and compete for the codes of the last level. Reassigned items
    can collide with others, so the groups are formed again in every round.

    Args:
        model: its codebooks, and `config.sinkhorn_epsilon`; 0 leaves the codes unchanged.
        latents: float32 [items, code_dim].
        codes: int64 [items, levels], initial codes.

    Returns:
        int64 [items, levels], possibly with collisions left.
    """
    codes = codes.copy()
    residuals = latents - sum(
        (book[torch.from_numpy(codes[:, level])] for level, book in enumerate(model.codebooks[:-1])),
        torch.zeros_like(latents),
    )
    epsilon = model.config.sinkhorn_epsilon
    for _ in range(rounds if epsilon > 0 else 0):
        previous = codes.copy()
        for group in collision_groups(codes):
            distances = squared_distances(residuals[torch.from_numpy(group)], model.codebooks[-1])
            codes[group, -1] = sinkhorn(distances, epsilon, model.config.sinkhorn_rounds).argmax(1).numpy()
        if (codes == previous).all():
            break
    return codes


@torch.no_grad()
def resolve_collisions(model: RQVAE, latents: torch.Tensor, codes: np.ndarray) -> np.ndarray:
    """Make every semantic ID unique.

    Of the items that share a semantic ID, the nearest one keeps it. The others, nearest first, take the first free
    semantic ID in the order of a depth-first search: the codes of the last level by distance; when all of them are
    taken, the level above moves to its next nearest code, and so on upwards.

    Args:
        latents: float32 [items, code_dim].
        codes: int64 [items, levels].

    Returns:
        int64 [items, levels] without collisions.

    Raises:
        InputError: there are more items than semantic IDs.
    """
    codebooks = [book.numpy() for book in model.codebooks]
    check_sizes([len(book) for book in codebooks], len(codes))
    codes, points = codes.copy(), latents.numpy()
    occupied = _OccupiedCodes(codebooks, codes)
    for group in collision_groups(codes):
        centre = sum(book[codes[group[0], level]] for level, book in enumerate(codebooks))
        _, *displaced = group[np.argsort(((points[group] - centre) ** 2).sum(1), kind="stable")]
        for row in displaced:
            codes[row] = occupied.take_nearest(points[row])
    return codes


@torch.no_grad()
def assign_free_codes(model: RQVAE, latents: torch.Tensor, codes: np.ndarray) -> np.ndarray:
    """Assign a free semantic ID to each new item, one after another: its nearest codes, or what is free beside them.

    The search is that of `resolve_collisions`. It uses no code that `codes` does not have: a model that was tuned on
    these has no token for it.

    Args:
        latents: float32 [new items, code_dim].
        codes: int64 [items, levels], the semantic IDs in use.

    Returns:
        int64 [new items, levels], distinct and not among `codes`.

    Raises:
        InputError: there are more new items than free semantic IDs.
    """
    used = [np.unique(column) for column in codes.T]
    places = np.stack([np.searchsorted(*pair) for pair in zip(used, codes.T, strict=True)], axis=1)
    codebooks = [book.numpy()[known] for book, known in zip(model.codebooks, used, strict=True)]
    occupied = _OccupiedCodes(codebooks, places)
    if len(latents) > (num_free := occupied.capacity[0] - len(codes)):
        raise InputError(
            f"{len(latents):,} new items, but {num_free:,} semantic IDs of the codes in use are free; train a new "
            "RQ-VAE with larger --codebook_sizes, and tune the model on its semantic IDs"
        )
    new = np.array([occupied.take_nearest(point) for point in latents.numpy()], dtype=np.int64)
    return np.stack([known[column] for known, column in zip(used, new.T, strict=True)], axis=1)


class _OccupiedCodes:
    """Semantic IDs in use, as a count below each prefix, so that a search passes over full prefixes at once.

    Args:
        codebooks: float32 [size, code_dim] of each level.
        codes: int64 [items, levels], the semantic IDs of the items; the same one can occur more than once.
    """

    def __init__(self, codebooks: list[np.ndarray], codes: np.ndarray):
        self.codebooks = codebooks
        sizes = [len(book) for book in codebooks]
        self.capacity = [math.prod(sizes[level:]) for level in range(len(sizes) + 1)]  # below a prefix of each length
        self.counts: Counter[tuple[int, ...]] = Counter()
        for semantic_id in set(map(tuple, codes.tolist())):
            self._occupy(semantic_id)

    def take_nearest(self, point: np.ndarray) -> tuple[int, ...]:
        """Occupy the first free semantic ID of a depth-first search, nearest code first on each level; return it."""
        prefix: tuple[int, ...] = ()
        for level, book in enumerate(self.codebooks):
            order = np.argsort(((book - point) ** 2).sum(1), kind="stable").tolist()
            # A prefix that is not full leads to a free semantic ID, so that the search never goes back a level.
            code = next(code for code in order if self.counts[(*prefix, code)] < self.capacity[level + 1])
            prefix, point = (*prefix, code), point - book[code]
        self._occupy(prefix)
        return prefix

    def _occupy(self, semantic_id: tuple[int, ...]) -> None:
        self.counts.update(semantic_id[:length] for length in range(1, len(semantic_id) + 1))
