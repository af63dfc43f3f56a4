"""Semantic IDs: one code from the codebook of each level; levels are named by letters, written `<a_12><b_3>`."""

from math import prod
from random import Random

import numpy as np

from reclingua.utils.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def default_sizes(num_items: int) -> list[int]:
    """Return the number of codes of each level: LC-Rec's for many items, fewer for up to 5,000."""
    return [32, 32, 64] if num_items <= 5_000 else [256] * 4


def check_sizes(sizes: list[int], num_items: int) -> None:
    """Raise InputError for more than 26 levels, a level of one code, or fewer semantic IDs than items."""
    if len(sizes) > len(LETTERS):
        raise InputError(f"{len(sizes)} levels of codes; at most {len(LETTERS)} can be named, from a to z")
    if min(sizes) < 2:
        raise InputError(f"a level of {min(sizes)} codes; every level needs at least 2")
    if prod(sizes) < num_items:
        raise InputError(
            f"{num_items:,} items do not fit into {prod(sizes):,} semantic IDs; use more or larger codebooks"
        )


def random_codes(sizes: list[int], num_items: int, seed: int) -> np.ndarray:
    """Draw distinct random semantic IDs, int64 [items, levels], uniformly from all that `sizes` allow."""
    rng, num_ids = Random(seed), prod(sizes)
    numbers: dict[int, None] = {}  # a set in drawing order; num_ids can exceed the range of numpy integers
    while len(numbers) < num_items:
        numbers[rng.randrange(num_ids)] = None
    codes = np.empty((num_items, len(sizes)), dtype=np.int64)
    # A number is a semantic ID in mixed radix: the last level is its least significant digit.
    for row, number in enumerate(numbers):
        for level in reversed(range(len(sizes))):
            number, codes[row, level] = divmod(number, sizes[level])
    return codes


def to_tokens(codes: np.ndarray) -> list[list[str]]:
    """Convert codes int64 [items, levels] to the tokens of D.index.json."""
    return [[f"<{LETTERS[level]}_{code}>" for level, code in enumerate(row)] for row in codes.tolist()]
