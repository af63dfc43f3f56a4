"""Statistics of semantic IDs."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


def index_statistics(index: Mapping[str, Sequence[str]], categories: Mapping[str, set[str]] | None = None) -> dict:
    """BootstrapMetrics of an index, with what its prefixes have to do with categories (item -> categories) where given."""
    index = {item: tuple(codes) for item, codes in index.items()}
    owners = Counter(index.values())
    depth = max(map(len, owners))
    levels, prefixes = [], []
    for level in range(depth):
        codes = np.array([tokens[level] for tokens in index.values() if len(tokens) > level])
        levels.append({"codes_used": len(np.unique(codes)), "perplexity": perplexity(codes)})
    for length in range(1, depth + 1):
        begins = {item: tokens[:length] for item, tokens in index.items() if len(tokens) >= length}
        groups = Counter(begins.values())
        largest = [{"prefix": "".join(prefix), "items": items} for prefix, items in groups.most_common(5)]
        found = {"length": length, "groups": len(groups), "largest": largest}
        found["share_of_all_pairs"] = _pairs(groups) / max(1, _pairs([len(index)]))
        if categories is not None:
            members = Counter(category for item in index for category in categories[item])
            both = Counter((category, begin) for item, begin in begins.items() for category in categories[item])
            found["share_of_category_pairs"] = _pairs(both) / max(1, _pairs(members))
            share = found["share_of_all_pairs"]
            found["lift"] = found["share_of_category_pairs"] / share if share else None
        prefixes.append(found)
    return {
        "items": len(index),
        "indices": len(owners),
        "colliding_items": sum(count for count in owners.values() if count > 1),
        "levels": levels,
        "prefixes": prefixes,
    }


def _pairs(groups: Mapping | list[int]) -> int:
    """Pairs of items within groups of these sizes."""
    sizes = groups.values() if isinstance(groups, Mapping) else groups
    return sum(size * (size - 1) // 2 for size in sizes)


def perplexity(codes: np.ndarray) -> float:
    """Effective number of codes in use on a level, codes [items]: exp of the entropy of their shares."""
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(share * np.log(share)).sum()))
