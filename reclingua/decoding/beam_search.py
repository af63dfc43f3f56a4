"""Beam search constrained to the trie of semantic IDs: every hypothesis is an item.

It uses neither `generate()` nor the model's `generation_config`, so a chat model's top-p or repetition penalty has no
effect here.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from reclingua.decoding.kv_cache import DecoderSelector
from reclingua.decoding.trie import Trie
from reclingua.utils.errors import InputError

SCORE_OVER = ("vocabulary", "trie")
NORMALISER_BYTES = 64 * 2**20  # of float32 logits whose log-sum-exp is computed at a time


@dataclass(frozen=True)
class ScoredItem:
    """Item with its score, the sum of the log-probabilities of the tokens of its semantic ID."""

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
    selector: DecoderSelector | None = None,
) -> list[list[ScoredItem]]:
    """Return the best items for each prompt, best first.

    At each level all continuations of all beams compete: complete ones for the list of items, others for the beam.

        beams (prefixes)   children in the trie       log-prob      goes to
        (5)      -1.0      (5, 7)  an item              -1.3        list of items
                           (5, 9)                       -2.1        beam
        (6)      -1.2      (6, 7)                       -1.9        beam

    Args:
        model: any decoder-only model with a KV cache, in eval mode.
        input_ids: int64 [batch, length], padded on the left.
        attention_mask: int64 [batch, length], 0 on padding.
        trie: the semantic IDs, on the model's device; they follow the prompt directly.
        num_beams: width of the beam, and number of items returned if so many are left; items occupy no beam.
        excluded: int64 [batch, any] from `trie.item_numbers`: items that must not be returned. The search never
            spends a beam on them.
        score_over: "vocabulary", log-probabilities over the whole vocabulary, as in `generate()`; or "trie", over the
            tokens that can follow in the trie.
        selector: chooses the decoder; None probes the model again at each call (`Recommender` keeps a selector).

    Equal scores: earlier complete items come first, then continuations of the better beam, then smaller tokens.

    Raises:
        InputError: the model's scores are not finite.
    """
    if model.training or score_over not in SCORE_OVER:
        raise ValueError(
            f"model.training {model.training}, score_over {score_over!r}: should be False, and one of {SCORE_OVER}"
        )
    decoder = (selector or DecoderSelector(model)).select(input_ids.shape[1], trie, num_beams)
    exhausted = trie.exhausted_states(excluded) if excluded is not None else None
    batch, device = len(input_ids), input_ids.device
    states = torch.zeros((batch, 1), dtype=torch.int64, device=device)  # of each beam in the trie
    scores = torch.zeros((batch, 1), device=device)  # float32; -inf: no beam
    best_items = torch.full((batch, num_beams), -1, device=device)  # complete items, best first
    best_scores = torch.full((batch, num_beams), -torch.inf, device=device)
    logits = decoder.prefill(input_ids, attention_mask)
    for level in range(trie.depth):
        # All continuations of all beams: [batch, beams, children], then [batch, candidates].
        children, exists = trie.children(states, level)
        gains = logits.gather(2, trie.token[children].long()).float()
        if score_over == "vocabulary":
            gains -= log_normaliser(logits)
        else:
            gains -= gains.masked_fill(~exists, -torch.inf).logsumexp(2, keepdim=True)
        if not gains.masked_fill(~exists, 0).isfinite().all():
            raise InputError("the model's scores are not finite: its weights are broken, or its dtype is too narrow")
        if exhausted is not None:
            exists &= ~trie.is_exhausted(children, exhausted)
        candidates = (scores.unsqueeze(2) + gains).masked_fill_(~exists, -torch.inf).flatten(1)
        children = children.flatten(1)
        items = trie.item[children].long()

        # Complete items compete for the list, the others for the beam.
        complete = candidates.masked_fill(items < 0, -torch.inf)
        best_scores, order = _stable_topk(torch.cat([best_scores, complete], dim=1), num_beams)
        best_items = torch.cat([best_items, items], dim=1).gather(1, order)
        scores, order = _stable_topk(candidates.masked_fill(items >= 0, -torch.inf), num_beams)
        # Scores only decrease: a list whose last item beats the best beam is final.
        if not (scores[:, 0] > best_scores[:, -1]).any():
            break
        beams = int((scores > -torch.inf).any(0).sum())
        scores, order = scores[:, :beams], order[:, :beams]
        states = children.gather(1, order)
        logits = decoder.step(trie.token[states].long(), parents=order // trie.width[level])
    return [
        [ScoredItem(trie.items[item], value) for item, value in zip(*row, strict=True) if value > -torch.inf]
        for row in zip(best_items.tolist(), best_scores.tolist(), strict=True)
    ]


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp, float32 [batch, beams, 1], in chunks: all rows at once would double the memory."""
    rows = logits.flatten(0, 1).split(max(1, NORMALISER_BYTES // (4 * logits.shape[2])))
    return torch.cat([part.float().logsumexp(1) for part in rows]).view(*logits.shape[:2], 1)


def _stable_topk(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest `count` scores of each row and their columns; equal ones in order, unlike `torch.topk`."""
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], order[:, :count]
