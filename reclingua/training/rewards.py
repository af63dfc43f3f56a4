"""Rewards of a user's candidates by name, and their weighted sum: `--rewards rank_penalty:1,prefix:0.5`.

Candidates are ranked, best first, since the rewards judge a list and not an item alone. All tensors are
[users, candidates]; where a list is shorter than others, `exists` is False at its end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from reclingua.utils.errors import InputError


@dataclass(frozen=True)
class Candidates:
    """Ranked candidates as the rewards see them.

    Args:
        is_target: bool, the item that the user chose next; at most one of a user.
        exists: bool.
        prefix_share: float32, share of the codes that the candidate shares with the target, from the first one on.
    """

    is_target: torch.Tensor
    exists: torch.Tensor
    prefix_share: torch.Tensor

    @property
    def discounts(self) -> torch.Tensor:
        """What a hit at each rank adds to NDCG: 1 / log2(rank + 1)."""
        ranks = torch.arange(1, self.exists.shape[1] + 1, device=self.exists.device)
        return (1 / torch.log2(ranks + 1.0)).expand(self.exists.shape)


def exact(candidates: Candidates) -> torch.Tensor:
    """Return 1 for the target, else 0."""
    return candidates.is_target.float()


def rank_penalty(candidates: Candidates) -> torch.Tensor:
    """Return 1 for the target and, beside it, a penalty for every other candidate, the larger the higher its rank.

    The reward of MiniOneRec (arXiv 2510.24431): the penalty is the discount of the rank, divided by the sum of the
    discounts of all ranks. A list without the target has no penalties.
    """
    discounts = candidates.discounts * candidates.exists
    shares = discounts / discounts.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    has_target = candidates.is_target.any(1, keepdim=True)
    return torch.where(candidates.is_target, 1.0, -shares * has_target)


def ndcg(candidates: Candidates) -> torch.Tensor:
    """Return 1 for the target, and for a candidate above it minus what NDCG would gain if the two changed places.

    Candidates below the target, and lists without it, get 0.
    """
    discounts, is_target = candidates.discounts, candidates.is_target
    of_target = (discounts * is_target).sum(1, keepdim=True)
    is_above = (discounts > of_target) & (of_target > 0)
    return torch.where(is_target, 1.0, (of_target - discounts) * is_above)


def prefix(candidates: Candidates) -> torch.Tensor:
    """Return the share of the target's codes with which a candidate begins; 1 for the target."""
    return candidates.prefix_share


REWARDS: dict[str, Callable[[Candidates], torch.Tensor]] = {
    function.__name__: function for function in (exact, rank_penalty, ndcg, prefix)
}


def parse_rewards(text: str) -> dict[str, float]:
    """Parse "exact:1,prefix:0.5" into name -> weight; a name alone has weight 1.

    Raises:
        InputError: an unknown reward, one that is given twice, a weight that is no finite number or 0.
    """
    weights: dict[str, float] = {}
    for entry in text.split(","):
        name, _, weight = entry.strip().partition(":")
        if name not in REWARDS:
            raise InputError(f"--rewards {name!r}: should be of {', '.join(REWARDS)}, with weights such as exact:1")
        if name in weights:
            raise InputError(f"--rewards {text}: has {name} twice")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = 0
        if not weights[name] or not math.isfinite(weights[name]):
            raise InputError(f"--rewards {entry.strip()}: the weight should be a number other than 0")
    return weights


def total_reward(weights: dict[str, float], candidates: Candidates) -> torch.Tensor:
    """Return the weighted sum of the rewards, float32 [users, candidates]; 0 where no candidate exists."""
    total = sum(weight * REWARDS[name](candidates) for name, weight in weights.items())
    return torch.as_tensor(total).masked_fill(~candidates.exists, 0)
