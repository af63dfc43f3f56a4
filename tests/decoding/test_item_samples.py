"""Stochastic beam search: every item is drawn as often as successive draws without replacement would draw it."""

from itertools import permutations

import pytest
import torch

from reclingua.decoding.item_samples import sample_items
from reclingua.decoding.item_scores import score_items
from reclingua.decoding.trie import Trie
from tests.decoding.test_beam_search import ITEMS, VOCABULARY, prompts
from tests.decoding.test_item_scores import UNEVEN
from tests.helpers.models import make_model

DRAWS = 4000


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("excluded", [None, ["c", "e", "d"]])
def test_frequencies_are_those_of_successive_draws(end, excluded):
    model, trie = make_model("llama", VOCABULARY, spread=2), Trie.build(UNEVEN, end)
    ids, mask = (tensor[:1] for tensor in prompts())
    numbers = torch.arange(len(trie))[None]
    left_out = None if excluded is None else trie.item_numbers([excluded]).expand(DRAWS, -1)
    probabilities = score_items(model, ids, mask, trie, numbers, "trie")[0].exp()
    if excluded:  # probabilities are those of the trie without these items
        kept = {item: tokens for item, tokens in UNEVEN.items() if item not in excluded}
        trie_of_kept = Trie.build(kept, end)
        of_kept = score_items(model, ids, mask, trie_of_kept, torch.arange(len(kept))[None], "trie")[0].exp()
        probabilities = torch.zeros(len(trie))
        probabilities[trie.item_numbers([list(kept)])[0]] = of_kept
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    many = {"input_ids": ids.expand(DRAWS, -1), "attention_mask": mask.expand(DRAWS, -1)}
    generator = torch.Generator().manual_seed(3)
    drawn = sample_items(model, **many, trie=trie, count=2, generator=generator, excluded=left_out)
    for first, second in permutations(range(len(trie)), 2):
        p, q = probabilities[first].item(), probabilities[second].item()
        expected = p * q / (1 - p) if p < 1 else 0
        share = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).float().mean().item()
        assert abs(share - expected) <= 4.5 * (expected * (1 - expected) / DRAWS) ** 0.5 + 1e-6


def test_items_are_different_and_run_out():
    model, (ids, mask), trie = make_model("llama", VOCABULARY), prompts(), Trie.build(ITEMS, 2)
    left_out = trie.item_numbers([["i0"], [], list(ITEMS)[2:]])
    draws = [
        sample_items(model, ids, mask, trie, 30, torch.Generator().manual_seed(seed), left_out) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    for row, left in enumerate((26, 27, 2)):
        numbers = draws[0][row]
        assert (numbers >= 0).sum() == left and (numbers[:left] >= 0).all()
        assert len(set(numbers[:left].tolist())) == left
    assert set(draws[0][2][:2].tolist()) == set(trie.item_numbers([["i0", "i1"]])[0].tolist())
    assert trie.item_to_number["i0"] not in draws[0][0]
