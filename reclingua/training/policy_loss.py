"""The losses of grpo.py, each for a user's group of candidates: GRPO and S-DPO.

GRPO (Shao et al., arXiv 2402.03300, section 4.1) maximises for each group of G candidates o_i with rewards r_i

    1/G sum_i 1/|o_i| sum_t  min(ratio A_i, clip(ratio, 1 - e, 1 + e) A_i) - beta KL
    ratio = pi(o_it) / pi_old(o_it)      A_i = (r_i - mean r) / std r      KL = pi_ref / pi - log(pi_ref / pi) - 1

where pi is the model that is trained, pi_old the one that made the candidates, and pi_ref the frozen SFT model.

Left out: a value model and process rewards (GRPO has neither, and a semantic ID has a few tokens); importance weights
for candidates of a beam search. Beam candidates are the best items and no sample of the policy, so the gradient is
that of a ranking loss over them, not an unbiased estimate of the policy gradient; sampled candidates without
replacement (`--candidates sample`) are not weighted by their inclusion probabilities either.

Shapes: log-probabilities and `is_token` are [groups, candidates, tokens], rewards, advantages and `exists`
[groups, candidates].
"""

import torch
from torch.nn import functional

STD_FLOOR = 1e-6


def find_informative(rewards: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return which groups have candidates of different rewards, bool [groups]: the others have no advantages."""
    highest = rewards.masked_fill(~exists, -torch.inf).amax(1)
    return highest > rewards.masked_fill(~exists, torch.inf).amin(1)


def group_advantages(rewards: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return the rewards of each group shifted to mean 0 and scaled to standard deviation 1; 0 for what is missing."""
    count = exists.sum(1, keepdim=True).clamp(min=1)
    centred = (rewards - (rewards * exists).sum(1, keepdim=True) / count) * exists
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / (std + STD_FLOOR)


def kl_estimate(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the estimate of KL(policy || reference) by each token: not negative, 0 where both agree."""
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def group_means(values: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Return the mean over each group's candidates of the mean over their tokens, float32 [groups]."""
    tokens = is_token.sum(2)
    of_candidates = (values * is_token).sum(2) / tokens.clamp(min=1)
    return of_candidates.sum(1) / (tokens > 0).sum(1).clamp(min=1)


def grpo_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor,
    is_token: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the GRPO loss of each group, float32 [groups].

    Args:
        log_probs, old, reference: of the trained model, of the model that made the candidates, of the SFT model.
        clip_range: largest deviation of the ratio from 1 that is rewarded.
        beta: weight of the KL divergence.

    Returns:
        the loss, and of each group, without gradients: kl, and clipped, the share of tokens at which the ratio is
        clipped.
    """
    ratio = (log_probs - old).exp()
    gain = advantages.unsqueeze(2)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    kl = kl_estimate(log_probs, reference)
    loss = group_means(beta * kl - torch.minimum(ratio * gain, clipped * gain), is_token)
    with torch.no_grad():
        is_clipped = (clipped * gain < ratio * gain).float()
        figures = {"kl": group_means(kl, is_token), "clipped": group_means(is_clipped, is_token)}
    return loss, figures


def sdpo_loss(
    log_probs: torch.Tensor,
    reference: torch.Tensor,
    is_token: torch.Tensor,
    is_target: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the S-DPO loss of each group (Chen et al., arXiv 2406.09215), float32 [groups].

    The target is preferred to all other candidates at once, by a softmax over these:

        - log sigmoid(- log sum_negatives exp(beta (m_negative - m_target)))      m = log(pi / pi_ref) of an item

    Args:
        is_target: bool [groups, candidates], one True of each group that counts.
        beta: scale of the margins m.

    Returns:
        the loss, and of each group, without gradients: kl, and accuracy, the share of other candidates with a smaller
        margin than the target.
    """
    margins = beta * (log_probs - reference).mul(is_token).sum(2)
    is_negative = is_token.any(2) & ~is_target
    of_target = margins.masked_fill(~is_target, 0).sum(1, keepdim=True)
    differences = (margins - of_target).masked_fill(~is_negative, -torch.inf)
    # A group without negatives has the log-sum-exp of nothing, -inf; its loss and gradient are 0.
    has_negative = is_negative.any(1)
    loss = functional.softplus(differences[has_negative].logsumexp(1))
    loss = torch.zeros_like(margins[:, 0]).masked_scatter(has_negative, loss)
    with torch.no_grad():
        accuracy = ((differences < 0) & is_negative).sum(1) / is_negative.sum(1).clamp(min=1)
        figures = {"kl": group_means(kl_estimate(log_probs, reference), is_token), "accuracy": accuracy}
    return loss, figures
