"""The trie of legal item indices: which tokens may follow, and which item a finished path is."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from errors import InputError


class Trie:
    """Prefix tree over the token sequences of all items.

    States are integers, 0 is the root. Only paths that spell an item's whole index exist, so whatever a search
    over the trie returns is an item.

    Args:
        sequences: item -> its index as token ids, at least one.
        end: token id that closes every sequence, or None where the index alone is enough (no index may then be
            the beginning of another).

    Raises:
        InputError: no items, an empty sequence, two items with one sequence, or one a prefix of another.
    """

    def __init__(self, sequences: Mapping[str, Sequence[int]], end: int | None = None):
        if not sequences:
            raise InputError("the trie is empty: no item has an index")
        self.children: list[dict[int, int]] = [{}]
        self.item_at: dict[int, str] = {}
        self.path: dict[str, list[int]] = {}  # item -> the states from below the root to its leaf
        for item, tokens in sequences.items():
            tokens = [*tokens] if end is None else [*tokens, end]
            if not tokens:
                raise InputError(f"item {item!r} has an empty index")
            state, path = 0, []
            for token in tokens:
                if token not in self.children[state]:
                    self.children[state][token] = len(self.children)
                    self.children.append({})
                state = self.children[state][token]
                path.append(state)
            if state in self.item_at:
                raise InputError(f"items {self.item_at[state]!r} and {item!r} have the same index")
            self.item_at[state] = item
            self.path[item] = path
        for state, item in self.item_at.items():
            if self.children[state]:
                raise InputError(f"the index of item {item!r} is the beginning of another item's index")
        self._leaves = Counter(state for path in self.path.values() for state in path)

    def __len__(self) -> int:
        return len(self.path)

    def dead_states(self, excluded: Iterable[str]) -> set[int]:
        """The states below which every item is in `excluded`; a search that avoids them never returns one of those."""
        seen = Counter(state for item in set(excluded) if item in self.path for state in self.path[item])
        return {state for state, count in seen.items() if count == self._leaves[state]}
