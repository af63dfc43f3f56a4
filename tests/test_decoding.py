"""The search: only items, the best of them, whatever the model, the padding and the exclusions."""

from collections import defaultdict

import pytest
import torch
from conftest import make_model

from decoding.beam import beam_search
from decoding.trie import Trie
from errors import InputError

VOCABULARY = 60
ITEMS = {f"i{n}": [10 + n // 9, 20 + n // 3 % 3, 30 + n % 3] for n in range(27)}


def prompts(lengths=(7, 3, 5), seed=0):
    """Left-padded random prompts: input_ids, attention_mask [batch, longest]."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = (
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
        torch.zeros(len(lengths), max(lengths)).long(),
    )
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


@torch.no_grad()
def exhaustive(model, prompt, sequences, end=None):
    """All items by their log-probability after one prompt, best first; no cache, no padding, no search."""
    scores = {}
    for item, tokens in sequences.items():
        answer = [*tokens, *([] if end is None else [end])]
        ids = torch.cat([prompt, torch.tensor(answer)])[None]
        log_probs = torch.log_softmax(model(ids).logits[0].float(), -1)
        scores[item] = sum(log_probs[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))
    return sorted(scores.items(), key=lambda pair: -pair[1])


def check(found, want):
    assert [r.item for r in found] == [item for item, _ in want]
    assert [r.score for r in found] == pytest.approx([score for _, score in want], abs=1e-4)


@pytest.mark.parametrize("end", [None, 2])
def test_a_beam_as_wide_as_the_items_finds_their_exact_order(architecture, end):
    model = make_model(architecture, VOCABULARY)
    ids, mask = prompts()
    lists = beam_search(model, ids, mask, Trie.build(ITEMS, end), num_beams=27)
    for row, found in enumerate(lists):
        check(found, exhaustive(model, ids[row][mask[row] == 1], ITEMS, end))


@pytest.mark.parametrize("num_beams", [1, 4, 10])
def test_narrow_beams_agree_with_generate(architecture, num_beams):
    """The same items in the same order as `generate()` under the same constraint."""
    model = make_model(architecture, VOCABULARY)
    trie = Trie.build(ITEMS, end=2)
    ids, mask = prompts()

    follows = defaultdict(set)
    for tokens in ITEMS.values():
        for at, token in enumerate([*tokens, 2]):
            follows[tuple(tokens[:at])].add(token)

    def allowed(_, tokens):
        return sorted(follows.get(tuple(tokens[ids.shape[1] :].tolist()), [2]))

    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, num_beams=num_beams, num_return_sequences=num_beams,
        prefix_allowed_tokens_fn=allowed, do_sample=False, length_penalty=0.0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    item_of = {tuple(tokens): item for item, tokens in ITEMS.items()}
    theirs = [item_of[tuple(row[ids.shape[1] :][:3].tolist())] for row in output]
    ours = [r.item for found in beam_search(model, ids, mask, trie, num_beams) for r in found]
    assert ours == theirs


def test_a_batch_gives_what_its_prompts_give_alone(architecture):
    model = make_model(architecture, VOCABULARY)
    ids, mask = prompts((9, 1, 4, 6))
    together = beam_search(model, ids, mask, Trie.build(ITEMS), 5)
    for row, found in enumerate(together):
        prompt = ids[row][mask[row] == 1][None]
        (alone,) = beam_search(model, prompt, torch.ones_like(prompt), Trie.build(ITEMS), 5)
        check(found, [(r.item, r.score) for r in alone])


def test_excluded_items_give_way_to_the_next_best():
    model = make_model("llama", VOCABULARY)
    ids, mask = prompts((5, 5))
    free = [exhaustive(model, prompt, ITEMS) for prompt in ids]
    excluded = [[item for item, _ in free[0][:20]], []]
    trie = Trie.build(ITEMS)
    first, second = beam_search(model, ids, mask, trie, 27, trie.item_numbers(excluded))
    check(first, free[0][20:])
    check(second, free[1])


def test_fewer_items_than_beams_and_none_at_all():
    model = make_model("llama", VOCABULARY)
    ids, mask = prompts((4,))
    few = dict(list(ITEMS.items())[:3])
    (found,) = beam_search(model, ids, mask, Trie.build(few), 20)
    assert sorted(r.item for r in found) == sorted(few)
    assert beam_search(model, ids, mask, Trie.build(few), 20, torch.tensor([[0, 1, 2, 1, -1]])) == [[]]


def test_indices_of_different_length():
    model = make_model("llama", VOCABULARY)
    mixed = {"short": [10], "long": [10, 20, 30], "middle": [11, 21]}
    ids, mask = prompts((4, 6))
    for row, found in enumerate(beam_search(model, ids, mask, Trie.build(mixed, end=2), 20)):
        check(found, exhaustive(model, ids[row][mask[row] == 1], mixed, end=2))


def test_what_no_trie_is_made_of():
    with pytest.raises(InputError, match="no item has an index"):
        Trie.build({})
    with pytest.raises(InputError, match="'x' has an empty index"):
        Trie.build({"x": []})
    with pytest.raises(InputError, match="'x' and 'y' have the same index"):
        Trie.build({"x": [1, 2], "y": [1, 2]})
    for sequences in ({"x": [1], "y": [1, 2]}, {"y": [1, 2], "x": [1]}):
        with pytest.raises(InputError, match="index of item 'x' is the beginning"):
            Trie.build(sequences)
    assert len(Trie.build({"x": [1], "y": [1, 2]}, end=3)) == 2
