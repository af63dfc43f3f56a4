"""Give every item an index of its own: spread colliding items by Sinkhorn, then move what is left to free codes."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from index.codes import check_sizes
from index.rqvae import RQVAE, sinkhorn, squared_distances


def groups_of(codes: np.ndarray) -> list[np.ndarray]:
    """Rows that share an index with another row, group by group; codes int64 [items, levels]."""
    rows = defaultdict(list)
    for row, code in enumerate(map(tuple, codes.tolist())):
        rows[code].append(row)
    return [np.array(group) for group in rows.values() if len(group) > 1]


def count_collisions(codes: np.ndarray) -> int:
    """Number of items whose index is also another item's."""
    return sum(map(len, groups_of(codes)))


@torch.no_grad()
def reassign_by_sinkhorn(model: RQVAE, latents: torch.Tensor, codes: np.ndarray, rounds: int = 20) -> np.ndarray:
    """Re-assign the last level of colliding items by Sinkhorn within each group, up to `rounds` times (LC-Rec).

    Args:
        latents: float32 [items, code_dim]; codes: int64 [items, levels], nearest on every level.
    """
    codes = codes.copy()
    residuals = latents - sum(
        (book[torch.from_numpy(codes[:, level])] for level, book in enumerate(model.codebooks[:-1])),
        torch.zeros_like(latents),
    )
    epsilon = model.config.sinkhorn_epsilon
    for _ in range(rounds if epsilon > 0 else 0):
        before = codes.copy()
        for group in groups_of(codes):
            distances = squared_distances(residuals[torch.from_numpy(group)], model.codebooks[-1])
            codes[group, -1] = sinkhorn(distances, epsilon, model.config.sinkhorn_rounds).argmax(1).numpy()
        if (codes == before).all():
            break
    return codes


@torch.no_grad()
def resolve_collisions(model: RQVAE, latents: torch.Tensor, codes: np.ndarray) -> np.ndarray:
    """Make every index unique; int64 [items, levels].

    The rule: of the items that share an index, the one nearest to it keeps it. The others, nearest first, each take
    the first free index in this order: the last level's codes by distance; when all of those are taken, the level
    above goes to its next nearest code, and so on upwards.
    """
    codebooks = [book.numpy() for book in model.codebooks]
    check_sizes([len(book) for book in codebooks], len(codes))
    codes, points = codes.copy(), latents.numpy()
    taken = set(map(tuple, codes.tolist()))
    for group in groups_of(codes):
        place = sum(book[codes[group[0], level]] for level, book in enumerate(codebooks))
        _, *leavers = group[np.argsort(((points[group] - place) ** 2).sum(1), kind="stable")]
        for row in leavers:
            codes[row] = next(index for index in _nearest_indices(points[row], codebooks) if index not in taken)
            taken.add(tuple(codes[row].tolist()))
    return codes


def _nearest_indices(point: np.ndarray, codebooks: list[np.ndarray]) -> Iterator[tuple[int, ...]]:
    """All indices, nearest code first on each level, the last level varying fastest."""
    if not codebooks:
        yield ()
        return
    for code in np.argsort(((codebooks[0] - point) ** 2).sum(1), kind="stable").tolist():
        for rest in _nearest_indices(point - codebooks[0][code], codebooks[1:]):
            yield (code, *rest)
