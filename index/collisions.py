"""Resolve collisions of semantic IDs: reassign colliding items by Sinkhorn, then move the rest to free codes."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from index.codes import check_sizes
from index.rqvae import RQVAE, sinkhorn, squared_distances


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
    occupied = set(map(tuple, codes.tolist()))
    for group in collision_groups(codes):
        centre = sum(book[codes[group[0], level]] for level, book in enumerate(codebooks))
        _, *displaced = group[np.argsort(((points[group] - centre) ** 2).sum(1), kind="stable")]
        for row in displaced:
            codes[row] = next(ids for ids in _nearest_semantic_ids(points[row], codebooks) if ids not in occupied)
            occupied.add(tuple(codes[row].tolist()))
    return codes


def _nearest_semantic_ids(point: np.ndarray, codebooks: list[np.ndarray]) -> Iterator[tuple[int, ...]]:
    """Yield all semantic IDs, nearest code first on each level, the last level varying fastest."""
    if not codebooks:
        yield ()
        return
    for code in np.argsort(((codebooks[0] - point) ** 2).sum(1), kind="stable").tolist():
        for suffix in _nearest_semantic_ids(point - codebooks[0][code], codebooks[1:]):
            yield (code, *suffix)
