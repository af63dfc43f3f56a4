"""Trie of the items' semantic IDs as flat tensors: the tokens that can follow, and the item of a complete path.

States are numbered level by level, 0 is the root. The children of a state have consecutive numbers, so they are one
range (compressed sparse rows), and one look-up serves all beams of all samples on any device.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reclingua.utils.errors import InputError

TENSORS = ("first_child", "token", "parent", "item", "leaf", "num_leaves", "level")


class Trie:
    """Prefix tree over the token sequences of all items; built by `Trie.build` or `Trie.load`.

    Every path spells the semantic ID of an item, so a search over the trie returns nothing but items. Items are
    numbered from 0 as in `items`, an array of strings. All tensors are int32, on one device (`to`); S states, N items:

        first_child [S + 1]: the children of state s are the states first_child[s] to first_child[s + 1] - 1
        token [S]: the token that leads to state s (the root: -1)
        parent [S]: the state above (the root: -1)
        item [S]: the item that ends in state s, -1 in a state with children
        leaf [N]: the state in which an item ends
        num_leaves [S]: number of items that end in s or below
        level [depth + 2]: the states of level d are level[d] to level[d + 1] - 1

    Three items, A = (5, 7), B = (5, 9), C = (6, 7):

        0 -5-> 1 -7-> 3 = A         state         0  1  2  3  4  5
                 -9-> 4 = B         token        -1  5  6  7  9  7
          -6-> 2 -7-> 5 = C         parent       -1  0  0  1  1  2
                                    first_child   1  3  5  6  6  6  6
                                    item         -1 -1 -1  A  B  C
                                    num_leaves    3  2  1  1  1  1
                                    level         0  1  3  6
    """

    first_child: torch.Tensor
    token: torch.Tensor
    parent: torch.Tensor
    item: torch.Tensor
    leaf: torch.Tensor
    num_leaves: torch.Tensor
    level: torch.Tensor

    def __init__(self, items: Sequence[str], tensors: Mapping[str, torch.Tensor]):
        self.items = np.array(items, dtype=np.dtypes.StringDType())  # a quarter of the memory of a list of str
        for name in TENSORS:
            setattr(self, name, tensors[name])
        self.depth = len(self.level) - 2  # tokens of the longest semantic ID
        children = self.first_child.diff()
        bounds = self.level.tolist()
        # Largest number of children of a state at each level: the shape of a look-up, known without a device transfer.
        self.width = [int(children[a:b].max()) for a, b in zip(bounds[:-2], bounds[1:-1], strict=True)]

    @classmethod
    def build(cls, sequences: Mapping[str, Sequence[int]], end: int | None = None) -> Self:
        """Build the trie of `sequences` by one sort.

        Args:
            sequences: item -> its semantic ID as token ids, at least one; lengths can differ.
            end: token id that is appended to every sequence, or None for no end (then no semantic ID can be a prefix
                of another).

        Raises:
            InputError: no items, an empty semantic ID, a duplicate, or a prefix of another.
        """
        items = list(sequences)
        if not items:
            raise InputError("the trie is empty: no item has an index")
        lengths = np.fromiter(map(len, sequences.values()), dtype=np.int64, count=len(items))
        if not lengths.all():
            raise InputError(f"item {items[int(lengths.argmin())]!r} has an empty index")
        depth = int(lengths.max()) + (end is not None)
        # One row an item, -1 after the end of shorter ones; sorted, so that items with a common prefix are neighbours.
        rows = np.full((len(items), depth), -1, dtype=np.int32)
        columns = np.arange(depth)
        rows[columns < lengths[:, None]] = np.fromiter(chain.from_iterable(sequences.values()), dtype=np.int32)
        if end is not None:
            rows[np.arange(len(items)), lengths] = end
            lengths = lengths + 1
        order = np.lexsort(rows.T[::-1])
        rows, lengths = rows[order], lengths[order]

        # A row begins a new state at level d if it differs from the row before in any of its first d tokens. The
        # states are then numbered column by column (* begins a state, the number is the state of the row):
        #
        #   item   tokens    differs   states
        #   A      5 7       * *       1 3
        #   B      5 9       . *       1 4
        #   C      6 7       * *       2 5
        differs = np.full((len(items), depth), True)
        differs[1:] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
        if not differs[:, -1].all():
            row = int(differs[:, -1].argmin())
            raise InputError(f"items {items[order[row - 1]]!r} and {items[order[row]]!r} have the same index")
        begins = differs & (columns < lengths[:, None])

        tokens, parents, level = [np.array([-1])], [np.array([-1])], [0, 1]
        above = np.zeros(len(items), dtype=np.int64)  # the state of each row at the level above
        leaf = np.empty(len(items), dtype=np.int32)
        for d in range(depth):
            new = begins[:, d]
            tokens.append(rows[new, d])
            parents.append(above[new])
            state = level[-1] - 1 + np.cumsum(new)
            leaf[order[lengths == d + 1]] = state[lengths == d + 1]
            above = np.where(d < lengths, state, above)
            level.append(level[-1] + int(new.sum()))
        states = level[-1]
        token, parent = np.concatenate(tokens), np.concatenate(parents)
        children = np.bincount(parent[1:], minlength=states)
        item = np.full(states, -1)
        item[leaf] = np.arange(len(items))
        if (is_prefix := (children > 0) & (item >= 0)).any():
            raise InputError(
                f"the index of item {items[item[is_prefix.argmax()]]!r} is the beginning of another item's index"
            )
        num_leaves = (item >= 0).astype(np.int64)
        for a, b in zip(level[-2:0:-1], level[:1:-1], strict=True):
            num_leaves += np.bincount(parent[a:b], weights=num_leaves[a:b], minlength=states).astype(np.int64)
        arrays = {
            "first_child": np.concatenate([[1], 1 + np.cumsum(children)]),
            "token": token,
            "parent": parent,
            "item": item,
            "leaf": leaf,
            "num_leaves": num_leaves,
            "level": np.array(level),
        }
        return cls(items, {name: torch.from_numpy(array.astype(np.int32)) for name, array in arrays.items()})

    def __len__(self) -> int:
        return len(self.items)

    @property
    def device(self) -> torch.device:
        return self.token.device

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors to `device` and return the trie itself."""
        for name in TENSORS:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def children(self, states: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the children of `states`, all of level `level`, in the order of their tokens.

        Args:
            states: int64, any shape [...].

        Returns:
            child states, int64 [..., width[level]]; and whether they exist, bool of the same shape. Where they do not,
            the number is a state with another parent. A level with one very wide state costs its width for all states.
        """
        offsets = torch.arange(self.width[level], device=self.device)
        children = self.first_child[states].unsqueeze(-1) + offsets
        exists = children < self.first_child[states + 1].unsqueeze(-1)
        return children.clamp(max=len(self.token) - 1), exists

    @cached_property
    def item_to_number(self) -> dict[str, int]:
        """Number of each item."""
        return {item: number for number, item in enumerate(self.items.tolist())}

    def item_numbers(self, lists: Sequence[Collection[str]]) -> torch.Tensor:
        """Return the numbers of the items of each list, int64 [lists, longest], -1 for padding and unknown items."""
        width = max(map(len, lists), default=0)
        rows = [[self.item_to_number.get(item, -1) for item in items] + [-1] * (width - len(items)) for items in lists]
        return torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(len(lists), width)

    def paths(self, items: torch.Tensor) -> list[torch.Tensor]:
        """Return the state of each item's path at each level, 0 to the depth, int64 of the shape of `items`.

        -1 below a complete item, and for -1 in `items`, which is no item.
        """
        bounds = self.level.tolist()
        state = self.leaf[items.clamp(min=0)].long()
        states = []
        for level in range(self.depth, 0, -1):
            states.append(torch.where((state >= bounds[level]) & (items >= 0), state, -1))
            state = torch.where(state >= bounds[level], self.parent[state].long(), state)
        return [torch.zeros_like(items), *reversed(states)]

    def exhausted_states(self, excluded: torch.Tensor) -> torch.Tensor:
        """Return the states below which all items of a sample are excluded, as keys for `is_exhausted`.

        Every excluded leaf counts once in all states above it; a state is exhausted if it counts all its leaves.

        Args:
            excluded: int64 [batch, any], item numbers, -1 for none; duplicates count once.

        Returns:
            int64 [any], sorted: sample * number of states + state.
        """
        sample, column = (excluded >= 0).nonzero(as_tuple=True)
        keys = (sample * len(self.token) + self.leaf[excluded[sample, column]]).unique()
        sample, state = keys // len(self.token), keys % len(self.token)
        passed = []
        for _ in range(self.depth):
            passed.append(sample * len(self.token) + state)
            above = self.parent[state]
            sample, state = sample[above > 0], above[above > 0].long()
        keys, excluded_leaves = torch.cat(passed).unique(return_counts=True)
        return keys[excluded_leaves == self.num_leaves[keys % len(self.token)]]

    def is_exhausted(self, states: torch.Tensor, exhausted: torch.Tensor) -> torch.Tensor:
        """Return whether `states` [batch, ...] are among the `exhausted_states` of their sample, bool [batch, ...]."""
        if not len(exhausted):
            return torch.zeros_like(states, dtype=torch.bool)
        sample = torch.arange(len(states), device=self.device).view(-1, *[1] * (states.ndim - 1))
        keys = sample * len(self.token) + states
        return exhausted[torch.searchsorted(exhausted, keys).clamp(max=len(exhausted) - 1)] == keys

    def save(self, path: str | Path) -> None:
        """Write the trie as one safetensors file, for serving a model without its dataset folder."""
        names = torch.frombuffer(bytearray(json.dumps(self.items.tolist()).encode()), dtype=torch.uint8)
        save_file({name: getattr(self, name).cpu() for name in TENSORS} | {"items": names}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a trie that `save` wrote, onto the CPU; InputError if the file contains none."""
        try:
            tensors = load_file(path)
            items = json.loads(tensors["items"].numpy().tobytes())
            tensors = {name: tensors[name] for name in TENSORS}
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path}: no trie could be read from this file ({error})") from None
        except KeyError as error:
            raise InputError(f"{path}: contains no trie: it has no tensor {error}") from None
        if not _is_sound(items, tensors):
            raise InputError(f"{path}: its tensors are no valid trie; write the file again with Trie.save")
        return cls(items, tensors)


def _is_sound(items: object, tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether the tensors are consistent: every state that a look-up can reach exists."""
    if not isinstance(items, list) or any(t.dtype != torch.int32 or t.ndim != 1 for t in tensors.values()):
        return False
    first_child, token, parent, item, leaf, num_leaves, level = (tensors[name].long() for name in TENSORS)
    states, count = len(token), len(items)
    if not (
        len(first_child) == states + 1 and len(parent) == len(item) == len(num_leaves) == states and len(leaf) == count
    ):
        return False
    ascending = (first_child.diff() >= 0).all() and (level.diff() > 0).all()
    if not (states and count and len(level) > 2 and ascending and first_child[0] == 1 and first_child[-1] == states):
        return False
    if level[0] != 0 or level[-1] != states or not ((leaf > 0) & (leaf < states)).all():
        return False
    children = torch.arange(states).repeat_interleave(first_child.diff())
    return (
        torch.equal(parent[1:], children)
        and torch.equal(item[leaf], torch.arange(count))
        and bool(num_leaves[0] == count)
    )
