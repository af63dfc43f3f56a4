"""Rewards of ranked candidates: values by hand, weights, refusals."""

import math

import pytest
import torch

from reclingua.training.rewards import REWARDS, Candidates, parse_rewards, total_reward
from reclingua.utils.errors import InputError

THIRD = 1 / math.log2(3)


@pytest.fixture
def candidates():
    """Three lists: the target at rank 2, no target, the target at rank 1 of two candidates."""
    is_target = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    exists = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    share = torch.tensor([[0.5, 1, 0], [0, 0.5, 0], [1, 0, 0]])
    return Candidates(is_target, exists, share)


def test_rewards_by_hand(candidates):
    discounts = [1, THIRD, 0.5]
    three, two = sum(discounts), sum(discounts[:2])
    expected = {
        "exact": [[0, 1, 0], [0, 0, 0], [1, 0, 0]],
        "rank_penalty": [[-1 / three, 1, -0.5 / three], [0, 0, 0], [1, -THIRD / two, 0]],
        "ndcg": [[THIRD - 1, 1, 0], [0, 0, 0], [1, 0, 0]],
        "prefix": [[0.5, 1, 0], [0, 0.5, 0], [1, 0, 0]],
    }
    assert REWARDS.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(total_reward({name: 1.0}, candidates), torch.tensor(values, dtype=torch.float32))


def test_weights(candidates):
    weights = parse_rewards("exact, prefix:0.5,ndcg:-2")
    assert weights == {"exact": 1, "prefix": 0.5, "ndcg": -2}
    total = total_reward(weights, candidates)
    assert total[0].tolist() == pytest.approx([0.25 - 2 * (THIRD - 1), 1 + 0.5 - 2, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hit", "'hit': should be of exact, rank_penalty, ndcg, prefix"),
        ("", "'': should be of"),
        ("exact:1,exact:2", "has exact twice"),
        ("exact:much", "the weight should be a number other than 0"),
        ("exact:0", "the weight should be a number other than 0"),
        ("exact:nan", "the weight should be a number other than 0"),
    ],
)
def test_bad_rewards(text, message):
    with pytest.raises(InputError, match=message):
        parse_rewards(text)
