"""Regularised normal equations of item-to-item regressions, solved in place in float32."""

import numpy as np
from scipy.linalg import lapack

MAX_ITEMS = 20_000  # a dense float32 matrix of so many rows and columns has 1.6 GB
BLOCK = 1024  # rows and columns that are mirrored at a time


def too_many_items(num_items: int) -> str:
    """Return why a dense item-to-item matrix is too large; "" if it is not."""
    if num_items <= MAX_ITEMS:
        return ""
    return f"{num_items:,} items; its dense matrix is for {MAX_ITEMS:,} at most"


def factorize(gram: np.ndarray, l2: float) -> np.ndarray:
    """Return the Cholesky factor of gram + l2 x I in the memory of `gram`, float32 [items, items], C-contiguous.

    The upper triangle holds U with U^T U = gram + l2 x I; the lower one is undefined.
    """
    gram[np.diag_indices_from(gram)] += l2
    factor, info = lapack.spotrf(gram.T, lower=1, overwrite_a=1, clean=0)  # gram.T is Fortran-contiguous: no copy
    if info:
        raise FloatingPointError(f"the matrix is not positive definite at row {info}")
    return factor.T


def invert(gram: np.ndarray, l2: float) -> np.ndarray:
    """Return the inverse of gram + l2 x I in the memory of `gram`, float32 [items, items]."""
    inverse, info = lapack.spotri(factorize(gram, l2).T, lower=1, overwrite_c=1)
    if info:
        raise FloatingPointError(f"the matrix is singular at row {info}")
    inverse = inverse.T
    for start in range(0, len(inverse), BLOCK):  # mirrors the upper triangle, block by block
        rows = slice(start, start + BLOCK)
        inverse[rows, rows] = np.triu(inverse[rows, rows]) + np.triu(inverse[rows, rows], 1).T
        inverse[start + BLOCK :, rows] = inverse[rows, start + BLOCK :].T
    return inverse


def solve(gram: np.ndarray, targets: np.ndarray, l2: float) -> np.ndarray:
    """Return (gram + l2 x I)^-1 targets, float32 [items, items]; overwrites `gram`."""
    solution, info = lapack.spotrs(factorize(gram, l2).T, targets, lower=1)
    if info:
        raise FloatingPointError(f"argument {-info} is invalid")
    return np.ascontiguousarray(solution)
