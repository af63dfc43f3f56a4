"""Exact scores of given items: those of a forward pass for each item alone, and of the beam search."""

import pytest
import torch

from reclingua.decoding.beam_search import beam_search
from reclingua.decoding.item_scores import score_items
from reclingua.decoding.kv_cache import DecoderSelector
from reclingua.decoding.trie import Trie
from tests.decoding.test_beam_search import ITEMS, VOCABULARY, exhaustive, prompts
from tests.helpers.models import make_model

UNEVEN = {"a": [10], "b": [11, 20], "c": [11, 21, 30], "d": [12, 20, 31, 9], "e": [12, 20, 31, 8], "f": [13, 7]}
CANDIDATES = (["i3", "i26", "i4", "i3"], ["i9"], [])


@pytest.mark.parametrize("end", [None, 2])
def test_scores_are_those_of_each_item_alone(architecture, end):
    check(make_model(architecture, VOCABULARY), ITEMS, CANDIDATES, end)


@pytest.mark.parametrize("strategy", ["tree", "replicated"])
@pytest.mark.parametrize("end", [None, 2])
def test_semantic_ids_of_several_lengths(strategy, end):
    model = make_model("llama", VOCABULARY)
    check(model, UNEVEN, (["a", "b"], ["f", "e", "c", "a"], ["d"]), end, DecoderSelector(model, strategy))


def check(model, sequences, candidates, end, selector=None):
    ids, mask = prompts()
    trie = Trie.build(sequences, end)
    scores = score_items(model, ids, mask, trie, trie.item_numbers(candidates), selector=selector)
    assert scores.shape == (3, 4)
    for row, items in enumerate(candidates):
        expected = dict(exhaustive(model, ids[row][mask[row] == 1], sequences, end))
        assert scores[row, : len(items)].tolist() == pytest.approx([expected[item] for item in items], abs=1e-4)
        assert scores[row, len(items) :].isneginf().all()


@pytest.mark.parametrize("architecture", ["llama", "bloom", "mistral-window"])
@pytest.mark.parametrize("score_over", ["vocabulary", "trie"])
def test_scores_are_those_of_the_beam(architecture, score_over):
    model, (ids, mask), trie = make_model(architecture, VOCABULARY), prompts(), Trie.build(ITEMS, 2)
    lists = beam_search(model, ids, mask, trie, 6, score_over=score_over)
    numbers = trie.item_numbers([[scored.item for scored in ranked] for ranked in lists])
    expected = torch.tensor([[scored.score for scored in ranked] for ranked in lists])
    torch.testing.assert_close(score_items(model, ids, mask, trie, numbers, score_over), expected, atol=1e-4, rtol=0)
