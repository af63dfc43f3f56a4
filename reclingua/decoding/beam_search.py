"""Beam search over the trie of legal indices: every hypothesis is an item, always.

Neither the model's `generation_config` nor `generate()` plays a part, so a chat model's top-p or repetition penalty
cannot act here.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from reclingua.decoding.kv_cache import ReplicatedCacheDecoder, TreeAttentionDecoder, choose_decoder
from reclingua.decoding.trie import Trie
from reclingua.utils.errors import InputError

SCORE_OVER = ("vocabulary", "trie")


@dataclass(frozen=True)
class ScoredItem:
    """An item and its score: the sum of the log-probabilities of the tokens of its index."""

    item: str
    score: float


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    num_beams: int,
    excluded: torch.Tensor | None = None,
    score_over: str = "vocabulary",
    forward: TreeAttentionDecoder | ReplicatedCacheDecoder | None = None,
) -> list[list[ScoredItem]]:
    """The best items for each prompt, best first.

    Args:
        model: any decoder-only model with a KV cache, in eval mode.
        input_ids: int64 [batch, length], padded on the left.
        attention_mask: int64 [batch, length], 0 on padding.
        trie: the legal indices, on the model's device; they follow the prompt directly.
        num_beams: width of the beam and the number of items returned, fewer only where fewer items are left. Indices
            that are complete leave the beam to the others.
        excluded: int64 [batch, any] from `trie.item_numbers`: items that must not be returned. The search never
            spends a beam on them.
        score_over: "vocabulary", log-probabilities over the whole vocabulary, as `generate()` has them; or "trie",
            over the tokens that may follow in the trie.
        forward: how the beams are computed; by default the faster way that is right for this model.

    Equal scores: what was complete earlier comes first, then what continues the better beam, then the smaller token.

    Raises:
        InputError: the model's scores are not finite numbers.
    """
    if model.training or score_over not in SCORE_OVER:
        raise ValueError(
            f"model.training {model.training}, score_over {score_over!r}: should be False, and one of {SCORE_OVER}"
        )
    forward = forward or choose_decoder(model, input_ids.shape[1], trie, num_beams)
    dead = trie.exhausted_states(excluded) if excluded is not None else None
    batch, device = len(input_ids), input_ids.device
    states = torch.zeros((batch, 1), dtype=torch.int64, device=device)  # where each beam stands in the trie
    scores = torch.zeros((batch, 1), device=device)  # float32; -inf: there is no such beam
    found = torch.full((batch, num_beams), -1, device=device)  # complete items, best first
    found_scores = torch.full((batch, num_beams), -torch.inf, device=device)
    logits = forward.prefill(input_ids, attention_mask)
    for level in range(trie.depth):
        # All continuations of all beams: [batch, beams, children], then [batch, candidates].
        children, possible = trie.children(states, level)
        gains = logits.gather(2, trie.token[children].long()).float()
        if score_over == "vocabulary":
            gains -= _log_normaliser(logits)
        else:
            gains -= gains.masked_fill(~possible, -torch.inf).logsumexp(2, keepdim=True)
        if not gains.masked_fill(~possible, 0).isfinite().all():
            raise InputError("the model's scores are not finite: its weights are broken, or its dtype is too narrow")
        if dead is not None:
            possible &= ~trie.is_exhausted(children, dead)
        candidates = (scores.unsqueeze(2) + gains).masked_fill_(~possible, -torch.inf).flatten(1)
        children = children.flatten(1)
        items = trie.item[children].long()

        # Those that are an item compete for the list, the others for the beam.
        complete = candidates.masked_fill(items < 0, -torch.inf)
        found_scores, order = _stable_topk(torch.cat([found_scores, complete], dim=1), num_beams)
        found = torch.cat([found, items], dim=1).gather(1, order)
        scores, order = _stable_topk(candidates.masked_fill(items >= 0, -torch.inf), num_beams)
        # A score only falls: a list whose last item beats the best beam is final.
        if not (scores[:, 0] > found_scores[:, -1]).any():
            break
        beams = int((scores > -torch.inf).any(0).sum())
        scores, order = scores[:, :beams], order[:, :beams]
        states = children.gather(1, order)
        logits = forward.step(trie.token[states].long(), parents=order // trie.width[level])
    return [
        [ScoredItem(trie.items[item], value) for item, value in zip(*row, strict=True) if value > -torch.inf]
        for row in zip(found.tolist(), found_scores.tolist(), strict=True)
    ]


def _log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """float32 [batch, beams, 1] of [batch, beams, vocabulary], 32 rows at a time: whole it would double the memory."""
    rows = logits.flatten(0, 1).split(32)
    return torch.cat([part.float().logsumexp(1) for part in rows]).view(*logits.shape[:2], 1)


def _stable_topk(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest `count` scores of each row and where they are; of equal ones the first (top-k grants no order)."""
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], order[:, :count]
