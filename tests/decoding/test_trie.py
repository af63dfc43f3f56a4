"""The trie: exactly the paths of the items, whatever their lengths, on disk as in memory."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reclingua.decoding.trie import TENSORS, Trie
from reclingua.utils.errors import InputError

END = 99
indices = st.sets(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=40)


def paths(trie):
    """Item -> its tokens, by walking the trie from the root as a search does."""
    found, states = {}, [(0, ())]
    for level in range(trie.depth):
        below = []
        for state, path in states:
            children, exist = trie.children(torch.tensor([state]), level)
            for child in children[exist].tolist():
                tokens = (*path, int(trie.token[child]))
                if trie.item[child] >= 0:
                    found[trie.items[trie.item[child]]] = tokens
                else:
                    below.append((child, tokens))
        states = below
    return found


@given(indices)
def test_the_paths_are_the_indices(sequences):
    items = {f"item {number}": tokens for number, tokens in enumerate(sequences)}
    trie = Trie.build(items, end=END)
    assert paths(trie) == {item: (*tokens, END) for item, tokens in items.items()}
    assert len(trie) == len(items) and trie.num_leaves[0] == len(items)
    assert trie.width[0] == len({tokens[0] for tokens in sequences})


@given(indices, st.data())
def test_a_state_is_dead_when_all_its_items_are(sequences, data):
    trie = Trie.build({str(number): tokens for number, tokens in enumerate(sequences)}, end=END)
    lists = data.draw(st.lists(st.lists(st.sampled_from([*trie.item_to_number, "unknown"])), min_size=1, max_size=3))
    numbers = trie.item_numbers(lists)
    assert numbers.shape == (len(lists), max(map(len, lists)))
    states = torch.arange(1, len(trie.token)).expand(len(lists), -1)
    dead = trie.is_exhausted(states, trie.exhausted_states(numbers))
    for row, items in enumerate(lists):
        left = {state for item in set(trie.item_to_number) - set(items) for state in above(trie, item)}
        assert set(states[row][~dead[row]].tolist()) == left - {0}


def above(trie, item):
    state = int(trie.leaf[trie.item_to_number[item]])
    while state >= 0:
        yield state
        state = int(trie.parent[state])


def test_children_come_in_the_order_of_their_tokens():
    trie = Trie.build({"z": [5, 1], "y": [3, 9], "x": [5, 0], "w": [3, 2]})
    children, exist = trie.children(torch.tensor([[0, 0]]), 0)
    assert children.shape == exist.shape == (1, 2, 2) and exist.all()
    assert trie.token[children[0, 1]].tolist() == [3, 5]
    children, exist = trie.children(children[0, 0], 1)
    assert trie.token[children].tolist() == [[2, 9], [0, 1]] and exist.all()


def test_from_disk_it_is_the_same(tmp_path):
    trie = Trie.build({"ä\n1": [5, 1], "2": [3], "3": [5, 2, 7]}, end=END)
    trie.save(tmp_path / "trie.safetensors")
    again = Trie.load(tmp_path / "trie.safetensors")
    assert again.items.tolist() == trie.items.tolist() and again.width == trie.width
    assert all(torch.equal(getattr(again, name), getattr(trie, name)) for name in TENSORS)


def test_what_no_trie_is_made_of():
    with pytest.raises(InputError, match="no item has an index"):
        Trie.build({})
    with pytest.raises(InputError, match="'x' has an empty index"):
        Trie.build({"y": [1], "x": []})
    with pytest.raises(InputError, match="'x' and 'y' have the same index"):
        Trie.build({"x": [1, 2], "z": [1, 1], "y": [1, 2]})
    for sequences in ({"x": [1], "y": [1, 2]}, {"y": [1, 2], "x": [1]}):
        with pytest.raises(InputError, match="index of item 'x' is the beginning"):
            Trie.build(sequences)
    assert len(Trie.build({"x": [1], "y": [1, 2]}, end=3)) == 2


def test_a_file_that_is_no_trie(tmp_path):
    path = tmp_path / "trie.safetensors"
    with pytest.raises(InputError, match="trie.safetensors: no trie could be read"):
        Trie.load(path)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="trie.safetensors: no trie could be read"):
        Trie.load(path)
    save_file({"first_child": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="trie.safetensors: no trie could be read|no tensor 'items'"):
        Trie.load(path)


@pytest.mark.parametrize("name", [*TENSORS, "items"])
@pytest.mark.parametrize("harm", ["cut", "float", "shifted", "gone"])
def test_a_trie_file_that_was_tampered_with(tmp_path, name, harm):
    path = tmp_path / "trie.safetensors"
    Trie.build({str(n): [n // 9, n // 3 % 3, n % 3] for n in range(27)}).save(path)
    tensors = load_file(path)
    changed = {"cut": tensors[name][:-1], "float": tensors[name].float(), "shifted": tensors[name] + 1}
    tensors[name] = changed.get(harm)
    save_file({key: value.clone() for key, value in tensors.items() if value is not None}, path)
    if (name, harm) in {("token", "shifted"), ("num_leaves", "shifted")}:
        return  # other tokens and other counts are a trie, too
    with pytest.raises(InputError, match="trie.safetensors: (no trie|contains no trie|its tensors)"):
        Trie.load(path)


def test_a_hundred_thousand_items():
    rows = np.unique(np.random.default_rng(0).integers(0, 256, (100_000, 4)), axis=0)
    trie = Trie.build({str(n): row for n, row in enumerate(rows.tolist())})
    state, item = torch.zeros(len(rows), dtype=torch.long), torch.arange(len(rows))
    for level in range(4):  # every item is found again by its codes, all of them at once
        children, exist = trie.children(state, level)
        right = (trie.token[children] == torch.from_numpy(rows[:, level])[:, None]) & exist
        assert (right.sum(1) == 1).all()
        state = children[right]
    assert torch.equal(trie.item[state].long(), item)
