"""The losses of grpo.py: gradients of a plain implementation on full sequences, and values by hand."""

import pytest
import torch

from reclingua.decoding.item_scores import score_items, token_log_probs
from reclingua.decoding.trie import Trie
from reclingua.training.policy_loss import (
    find_informative,
    group_advantages,
    group_means,
    grpo_loss,
    kl_estimate,
    sdpo_loss,
)
from tests.decoding.test_beam_search import ITEMS, VOCABULARY, prompts
from tests.decoding.test_item_scores import CANDIDATES, UNEVEN
from tests.helpers.models import make_model

REWARDS = torch.tensor([[0.0, 1, 0, 0], [0.5, 1, 0, 0], [0, 0, 0, 0]])


def plain_log_probs(model, ids, mask, sequences, candidates, end, depth, score_over="vocabulary"):
    """Log-probabilities [batch, candidates, depth] from a sequence for each item alone, as lists of tensors."""
    rows = []
    for row, items in enumerate(candidates):
        prompt = ids[row][mask[row] == 1]
        for item in items:
            answer = [*sequences[item], *([] if end is None else [end])]
            logits = model(torch.cat([prompt, torch.tensor(answer)])[None]).logits[0].float()
            gains = []
            for at, token in enumerate(answer):
                values = logits[len(prompt) - 1 + at]
                if score_over == "trie":
                    paths = ([*path, *([] if end is None else [end])] for path in sequences.values())
                    legal = {path[at] for path in paths if path[:at] == answer[:at] and len(path) > at}
                    gains.append(values[token] - values[sorted(legal)].logsumexp(0))
                else:
                    gains.append(values.log_softmax(0)[token])
            rows.append((row, items.index(item), torch.stack(gains)))
    return rows


def one_of_each(candidates):
    """Candidates without duplicates: a group has none."""
    return [list(dict.fromkeys(items)) for items in candidates]


def gradients(model, loss):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("score_over", ["vocabulary", "trie"])
def test_log_probs_are_the_scores(architecture, score_over):
    model, (ids, mask), trie = make_model(architecture, VOCABULARY), prompts(), Trie.build(ITEMS, 2)
    numbers = trie.item_numbers(CANDIDATES)
    log_probs, is_token = token_log_probs(model, ids, mask, trie, numbers, score_over)
    scores = score_items(model, ids, mask, trie, numbers, score_over)
    assert log_probs.requires_grad and torch.equal(is_token.any(2), numbers >= 0)
    torch.testing.assert_close(log_probs.sum(2)[numbers >= 0], scores[numbers >= 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("score_over", ["vocabulary", "trie"])
@pytest.mark.parametrize(("sequences", "end"), [(ITEMS, 2), (ITEMS, None), (UNEVEN, 2)])
@pytest.mark.parametrize("kind", ["grpo", "sdpo"])
def test_gradient_is_that_of_full_sequences(kind, sequences, end, score_over, attention):
    model, (ids, mask), trie = make_model("llama-tied", VOCABULARY, spread=2), prompts(), Trie.build(sequences, end)
    model.set_attn_implementation(attention)
    chosen = (["a", "b"], ["f", "e", "c", "a"], ["d"]) if sequences is UNEVEN else one_of_each(CANDIDATES)
    numbers = trie.item_numbers(chosen)
    exists = numbers >= 0
    rewards = REWARDS[:, : numbers.shape[1]]
    advantages = group_advantages(rewards * exists, exists)
    log_probs, is_token = token_log_probs(model, ids, mask, trie, numbers, score_over)
    torch.manual_seed(1)
    old, reference = (log_probs.detach() + 0.3 * torch.randn(log_probs.shape) for _ in range(2))

    plain = []
    for row, column, gains in plain_log_probs(model, ids, mask, sequences, chosen, end, trie.depth, score_over):
        was, base = old[row, column, : len(gains)], reference[row, column, : len(gains)]
        plain.append((row, gains, was, base, float(advantages[row, column]), bool(rewards[row, column] == 1)))
    if kind == "grpo":
        ours = grpo_loss(log_probs, old, reference, is_token, advantages, clip_range=0.2, beta=0.1)[0].sum()
        theirs = plain_grpo(plain)
    else:
        is_target = (rewards == 1) & exists
        ours = sdpo_loss(log_probs, reference, is_token, is_target, beta=0.5)[0][is_target.any(1)].sum()
        theirs = plain_sdpo(plain)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    expected = gradients(model, theirs)
    assert max(gradient.abs().max() for gradient in expected) > 1e-2
    for gradient, other in zip(gradients(model, ours), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)


def plain_grpo(rows):
    total = 0
    for group in {row for row, *_ in rows}:
        losses = []
        for _, gains, was, base, advantage, _ in (entry for entry in rows if entry[0] == group):
            terms = []
            for new, old, reference in zip(gains, was, base, strict=True):
                ratio = torch.exp(new - old)
                limited = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
                kl = torch.exp(reference - new) - (reference - new) - 1
                terms.append(-min(ratio * advantage, limited * advantage) + 0.1 * kl)
            losses.append(sum(terms) / len(terms))
        total = total + sum(losses) / len(losses)
    return total


def plain_sdpo(rows):
    total = torch.zeros(())
    for group in {row for row, *_ in rows}:
        members = [entry for entry in rows if entry[0] == group]
        target = [0.5 * (gains - base).sum() for _, gains, _, base, _, is_target in members if is_target]
        negatives = [0.5 * (gains - base).sum() for _, gains, _, base, _, is_target in members if not is_target]
        if target and negatives:
            odds = sum(torch.exp(negative - target[0]) for negative in negatives)
            total = total - torch.log(torch.sigmoid(-torch.log(odds)))
    return total


def test_kl_of_the_unchanged_model_is_zero():
    model, (ids, mask), trie = make_model("llama", VOCABULARY), prompts(), Trie.build(ITEMS, 2)
    log_probs, is_token = token_log_probs(model, ids, mask, trie, trie.item_numbers(one_of_each(CANDIDATES)))
    kl = kl_estimate(log_probs, log_probs.detach())
    assert not kl.any()
    (gradient,) = torch.autograd.grad(group_means(kl, is_token).sum(), log_probs)
    assert not gradient.any()
    assert (kl_estimate(log_probs, log_probs.detach() - 0.5)[is_token] > 0).all()


def test_advantages_by_hand():
    exists = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    rewards = torch.tensor([[1.0, 0, 0, 0], [2, 1, 0, 0], [3, 3, 3, 3], [5, 0, 0, 0]])
    advantages = group_advantages(rewards, exists)
    root = 3**0.5
    expected = torch.tensor([[root, -1 / root, -1 / root, -1 / root], [1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    assert find_informative(rewards, exists).tolist() == [True, True, False, False]


def test_ratio_is_clipped():
    """A ratio beyond the range has no gradient if the advantage rewards its direction, and all of it if not."""
    old, is_token = torch.zeros(1, 4, 1), torch.ones(1, 4, 1, dtype=torch.bool)
    log_probs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().view(1, 4, 1).requires_grad_()
    advantages = torch.tensor([[1.0, 1, -1, -1]])
    loss, figures = grpo_loss(log_probs, old, old, is_token, advantages, clip_range=0.2, beta=0)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.flatten().tolist() == pytest.approx([0, -0.5 / 4, 1.5 / 4, 0])
    assert figures["clipped"].tolist() == [0.5]
