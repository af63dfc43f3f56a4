"""Statistics of semantic IDs: collisions, codebook use, and items that share a prefix."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


def index_statistics(index: Mapping[str, Sequence[str]], categories: Mapping[str, set[str]] | None = None) -> dict:
    """Compute statistics of semantic IDs.

    A prefix is the first 1, 2, ... codes of a semantic ID; items with the same prefix form a group. The lift is how
    many times more often two items share a prefix if they share a category.

    Args:
        index: item -> codes of its semantic ID.
        categories: item -> its categories, for the lift of each prefix length.

    Returns:
        {"items", "indices" (distinct semantic IDs), "colliding_items",
        "levels": of each level {"codes_used", "perplexity"},
        "prefixes": of each length {"length", "groups", "largest", "share_of_all_pairs", and with categories
        "share_of_category_pairs", "lift" (None if no pair shares the prefix)}}.
    """
    index = {item: tuple(codes) for item, codes in index.items()}
    owners = Counter(index.values())
    depth = max(map(len, owners))
    levels, prefixes = [], []
    for level in range(depth):
        codes = np.array([tokens[level] for tokens in index.values() if len(tokens) > level])
        levels.append({"codes_used": len(np.unique(codes)), "perplexity": perplexity(codes)})
    for length in range(1, depth + 1):
        prefix_of = {item: tokens[:length] for item, tokens in index.items() if len(tokens) >= length}
        groups = Counter(prefix_of.values())
        largest = [{"prefix": "".join(prefix), "items": items} for prefix, items in groups.most_common(5)]
        share = _num_pairs(groups) / max(1, _num_pairs([len(index)]))
        statistics = {"length": length, "groups": len(groups), "largest": largest, "share_of_all_pairs": share}
        if categories is not None:
            members = Counter(category for item in index for category in categories[item])
            both = Counter((category, prefix) for item, prefix in prefix_of.items() for category in categories[item])
            category_share = _num_pairs(both) / max(1, _num_pairs(members))
            statistics["share_of_category_pairs"] = category_share
            statistics["lift"] = category_share / share if share else None
        prefixes.append(statistics)
    return {
        "items": len(index),
        "indices": len(owners),
        "colliding_items": sum(count for count in owners.values() if count > 1),
        "levels": levels,
        "prefixes": prefixes,
    }


def _num_pairs(groups: Mapping | list[int]) -> int:
    """Count the pairs of items within groups; a list holds group sizes, a mapping group -> size."""
    sizes = groups.values() if isinstance(groups, Mapping) else groups
    return sum(size * (size - 1) // 2 for size in sizes)


def perplexity(codes: np.ndarray) -> float:
    """Return the effective number of codes in use on a level: exp of the entropy of their shares, codes [items]."""
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(share * np.log(share)).sum()))
