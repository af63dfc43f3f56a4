"""Beam search over the trie of legal indices: every hypothesis is an item, always.

The prompt is computed once; beams are rows that share a copy of its KV cache. Neither the model's
`generation_config` nor `generate()` plays a part, so a chat model's top-p or repetition penalty cannot act here.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from decoding.trie import Trie


@dataclass(frozen=True)
class Recommendation:
    """An item and its score: the sum of the log-probabilities (whole vocabulary) of its tokens."""

    item: str
    score: float


@dataclass(frozen=True)
class _Beam:
    score: float
    state: int
    row: int  # of the model's last output and cache; -1 once the item is complete
    token: int = -1


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    num_beams: int,
    excluded: Sequence[Sequence[str]] | None = None,
) -> list[list[Recommendation]]:
    """The best items for each prompt, best first.

    Args:
        model: any decoder-only model with a KV cache, in eval mode.
        input_ids: int64 [batch, length], padded on the left.
        attention_mask: int64 [batch, length], 0 on padding.
        trie: the legal indices; they follow the prompt directly.
        num_beams: width of the beam and the number of items returned, fewer only where fewer items are left.
        excluded: for each prompt, items that must not be returned; the search never spends a beam on them.

    Equal scores are ordered by the smaller token id, earlier beam first.
    """
    dead = [trie.dead_states(items) for items in excluded] if excluded is not None else [set()] * len(input_ids)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=True,
        logits_to_keep=1,
        **({"position_ids": positions} if takes_positions else {}),
    )
    positions = positions[:, -1]
    beams = [[_Beam(0.0, 0, row)] for row in range(len(input_ids))]
    while True:
        log_probs = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
        beams = _expand(beams, log_probs, trie, dead, num_beams)
        alive = [beam for sample in beams for beam in sample if beam.row >= 0]
        if not alive:
            break
        rows = torch.tensor([beam.row for beam in alive], device=input_ids.device)
        tokens = torch.tensor([[beam.token] for beam in alive], device=input_ids.device)
        positions = positions[rows] + 1
        attention_mask = torch.cat([attention_mask[rows], torch.ones_like(tokens)], dim=1)
        cache = output.past_key_values
        cache.reorder_cache(rows)
        output = model(
            input_ids=tokens,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions[:, None]} if takes_positions else {}),
        )
        numbers = iter(range(len(alive)))  # rows of the output just made
        beams = [
            [_Beam(b.score, b.state, next(numbers), b.token) if b.row >= 0 else b for b in sample] for sample in beams
        ]
    return [[Recommendation(trie.item_at[beam.state], beam.score) for beam in sample] for sample in beams]


def _expand(
    beams: list[list[_Beam]], log_probs: torch.Tensor, trie: Trie, dead: list[set[int]], num_beams: int
) -> list[list[_Beam]]:
    """One level down: each sample's beams replaced by the best `num_beams` of all their legal continuations."""
    grown = [[beam for beam in sample if beam.row < 0] for sample in beams]  # complete items compete on
    steps = [
        (owner, beam, token, state)
        for owner, sample in enumerate(beams)
        for beam in sample
        for token, state in sorted(trie.children[beam.state].items())
        if state not in dead[owner]
    ]
    gains = log_probs[[beam.row for _, beam, _, _ in steps], [token for _, _, token, _ in steps]].tolist()
    for (owner, beam, token, state), gain in zip(steps, gains, strict=True):
        row = -1 if state in trie.item_at else beam.row
        grown[owner].append(_Beam(beam.score + gain, state, row, token))
    return [sorted(sample, key=lambda beam: -beam.score)[:num_beams] for sample in grown]
