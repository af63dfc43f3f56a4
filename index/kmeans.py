"""Residual k-means, balanced or not: initial codebooks of an RQ-VAE, or codebooks without training."""

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from index.rqvae import squared_distances


@torch.no_grad()
def fill_codebooks(
    latents: torch.Tensor, codebooks: Iterable[torch.Tensor], seed: int, balanced: bool = False
) -> None:
    """Fill codebooks by k-means on the residuals of the earlier levels (LC-Rec, section 3.1.2).

    Args:
        latents: float32 [items, dim].
        codebooks: float [codes, dim] of each level, changed in place; codes beyond the number of items keep their
            values.
        balanced: every code of a level gets about as many items.
    """
    residual = latents
    for codebook in codebooks:
        clusters = min(len(codebook), len(residual))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # duplicate items leave codes without an item
            # One thread: several add to a centre in any order, and the result would depend on more than the seed.
            with threadpool_limits(1):
                kmeans = KMeans(clusters, n_init=1, random_state=seed).fit(residual.cpu().numpy())
        codebook[:clusters] = torch.from_numpy(kmeans.cluster_centers_).to(codebook)
        codes = torch.from_numpy(kmeans.labels_.astype(np.int64)).to(codebook.device)
        if balanced:
            codes = balance(residual, codebook)
        residual = residual - codebook[codes]


def balance(residual: torch.Tensor, codebook: torch.Tensor, rounds: int = 10) -> torch.Tensor:
    """Balance the clusters of a level: alternate balanced assignment and moving codes to the mean of their items.

    Args:
        residual: float32 [items, dim].
        codebook: float32 [codes, dim], changed in place.
        rounds: largest number of alternations.

    Returns:
        int64 [items], the code of each item.
    """
    codes = balanced_assignment(squared_distances(residual, codebook))
    for _ in range(rounds):
        sizes = torch.bincount(codes, minlength=len(codebook))[:, None]
        means = torch.zeros_like(codebook).index_add_(0, codes, residual) / sizes.clamp(min=1)
        codebook.copy_(torch.where(sizes > 0, means, codebook))
        previous, codes = codes, balanced_assignment(squared_distances(residual, codebook))
        if torch.equal(codes, previous):
            break
    return codes


def balanced_assignment(distances: torch.Tensor) -> torch.Tensor:
    """Assign a code to each item, no code to more than ceil(items / codes) items.

    Deferred acceptance (Gale and Shapley, 1962): every item proposes to its nearest code; a code over capacity keeps
    its nearest items and rejects the others, which propose to their next nearest code, until no item is rejected.
    The matching is stable: no item and code are both nearer to each other than to their partners. Memory peaks at
    14 bytes per item and code: 1 GB for 300,000 items and 256 codes.

    Args:
        distances: float [items, codes].

    Returns:
        int64 [items].
    """
    distances = distances.numpy()
    num_items, num_codes = distances.shape
    capacity = -(-num_items // num_codes)
    # Codes of each item, nearest first; a small dtype sorts faster.
    preferences = np.argsort(distances, axis=1, kind="stable").astype(np.min_scalar_type(num_codes))
    num_rejections = np.zeros(num_items, dtype=np.int64)
    codes = preferences[:, 0].copy()
    rows = np.arange(num_items)  # items of the codes with new proposals
    while True:
        by_code = rows[np.lexsort((distances[rows, codes[rows]], codes[rows]))]  # code by code, nearest first
        rank = np.arange(len(rows)) - np.searchsorted(codes[by_code], codes[by_code])  # within the code
        rejected = by_code[rank >= capacity]
        if not len(rejected):
            return torch.from_numpy(codes.astype(np.int64))
        num_rejections[rejected] += 1
        codes[rejected] = preferences[rejected, num_rejections[rejected]]
        rows = np.flatnonzero(np.isin(codes, codes[rejected]))


@torch.no_grad()
def balanced_codes(latents: torch.Tensor, codebooks: Iterable[torch.Tensor]) -> np.ndarray:
    """Assign balanced codes int64 [items, levels] to latents float32 [items, dim], level by level."""
    residual, codes = latents, []
    for codebook in codebooks:
        codes.append(balanced_assignment(squared_distances(residual, codebook)))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, 1).numpy()
