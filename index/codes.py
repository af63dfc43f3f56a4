"""What an index is made of: levels named by letters, on each a codebook of numbered codes, written `<a_12><b_3>`."""

from math import prod
from random import Random

import numpy as np

from reclingua.utils.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def default_sizes(items: int) -> list[int]:
    """Codes of each level: LC-Rec's for many items, fewer for up to 5,000."""
    return [32, 32, 64] if items <= 5_000 else [256] * 4


def check_sizes(sizes: list[int], items: int) -> None:
    """InputError where levels cannot be named, a level has no choice, or the items cannot all get an index."""
    if len(sizes) > len(LETTERS):
        raise InputError(f"{len(sizes)} levels of codes; at most {len(LETTERS)} can be named, from a to z")
    if min(sizes) < 2:
        raise InputError(f"a level of {min(sizes)} codes; each needs at least 2")
    if prod(sizes) < items:
        raise InputError(f"{items:,} items do not fit into {prod(sizes):,} indices; use more or larger codebooks")


def random_codes(sizes: list[int], items: int, seed: int) -> np.ndarray:
    """Distinct indices that say nothing of the items, int64 [items, levels], drawn from all that `sizes` allow."""
    draw, room = Random(seed), prod(sizes)
    numbers: dict[int, None] = {}  # in the order of drawing; room may be more than numpy's integers hold
    while len(numbers) < items:
        numbers[draw.randrange(room)] = None
    codes = np.empty((items, len(sizes)), dtype=np.int64)
    for row, number in enumerate(numbers):
        for level in reversed(range(len(sizes))):
            number, codes[row, level] = divmod(number, sizes[level])
    return codes


def to_tokens(codes: np.ndarray) -> list[list[str]]:
    """int64 [items, levels] as the tokens of D.index.json."""
    return [[f"<{LETTERS[level]}_{code}>" for level, code in enumerate(row)] for row in codes.tolist()]
