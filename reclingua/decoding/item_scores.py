"""Exact scores of given items: all candidates of a sample are branches over its prompt's cache, in one pass."""

import torch
from transformers import PreTrainedModel

from reclingua.decoding.beam_search import SCORE_OVER, log_normaliser
from reclingua.decoding.kv_cache import DecoderSelector
from reclingua.decoding.trie import Trie
from reclingua.utils.errors import InputError


@torch.no_grad()
def score_items(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    items: torch.Tensor,
    score_over: str = "vocabulary",
    selector: DecoderSelector | None = None,
) -> torch.Tensor:
    """Return the log-probability of each item's semantic ID after the prompt, as `beam_search` scores it.

    The candidates of a sample form a part of the trie. Its inner states are fed once each, whatever the number of
    candidates below them:

        candidates        states fed         scored
        A = (5, 7)        (5)                token 5 and 6 after the prompt
        B = (5, 9)        (6)                token 7 and 9 after (5)
        C = (6, 7)                           token 7 after (6)

    Args:
        model, input_ids, attention_mask, trie, score_over, selector: as in `beam_search`.
        items: int64 [batch, candidates], item numbers of the trie, -1 for none.

    Returns:
        float32 [batch, candidates], -inf for -1.

    Raises:
        InputError: the model's scores are not finite.
    """
    if model.training or score_over not in SCORE_OVER:
        raise ValueError(
            f"model.training {model.training}, score_over {score_over!r}: should be False, and one of {SCORE_OVER}"
        )
    states = _path_states(trie, items)
    # ---- The inner states of each level: tokens to feed, and the column of each candidate's state among them ----
    columns = [torch.zeros_like(items)]  # at level 0 every candidate is below the root
    inner: list[torch.Tensor] = [items.new_zeros((len(items), 1))]
    levels: list[tuple[torch.Tensor, torch.Tensor]] = []
    for level in range(1, trie.depth):
        is_inner = states[level + 1] >= 0
        fed, column = _distinct(states[level], is_inner, len(trie.token))
        width = fed.shape[1]  # a column more takes what complete candidates would write
        parents = fed.new_zeros((len(fed), width + 1)).scatter_(1, column.where(is_inner, width), columns[-1])
        levels.append((trie.token[fed].long().clamp(min=0), parents[:, :width]))
        inner.append(fed)
        columns.append(column)

    # ---- One pass over all of them ----
    nodes = sum(tokens.shape[1] for tokens, _ in levels)
    decoder = (selector or DecoderSelector(model)).select(input_ids.shape[1], trie, nodes)
    logits = [decoder.prefill(input_ids, attention_mask), *decoder.branch(levels)]

    scores = torch.zeros(items.shape, device=items.device)
    for level, (values, fed, column) in enumerate(zip(logits, inner, columns, strict=True)):
        if score_over == "vocabulary":
            normaliser = log_normaliser(values)[:, :, 0]
        else:
            children, exists = trie.children(fed, level)
            of_children = values.gather(2, trie.token[children].long().clamp(min=0)).float()
            normaliser = of_children.masked_fill(~exists, -torch.inf).logsumexp(2)
        exists = states[level + 1] >= 0
        tokens = trie.token[states[level + 1].clamp(min=0)].long().clamp(min=0)
        rows = torch.arange(len(items), device=items.device)[:, None]
        gains = values[rows, column, tokens].float() - normaliser.gather(1, column)
        scores += gains.masked_fill(~exists, 0)
    if not scores.isfinite().all():
        raise InputError("the model's scores are not finite: its weights are broken, or its dtype is too narrow")
    return scores.masked_fill(items < 0, -torch.inf)


def _path_states(trie: Trie, items: torch.Tensor) -> list[torch.Tensor]:
    """Return the state of each item's path at each level, from 0 to the depth, int64 [batch, candidates]; -1: none."""
    bounds = trie.level.tolist()
    state = trie.leaf[items.clamp(min=0)].long()
    states = []
    for level in range(trie.depth, 0, -1):
        states.append(torch.where((state >= bounds[level]) & (items >= 0), state, -1))
        state = torch.where(state >= bounds[level], trie.parent[state].long(), state)
    return [torch.zeros_like(items), *reversed(states)]


def _distinct(states: torch.Tensor, mask: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct states of each row under `mask`, and the column of each state among them.

    Args:
        states: int64 [batch, candidates], below `size`.

    Returns:
        int64 [batch, most], 0 for padding, at least one column; and int64 [batch, candidates], 0 outside the mask.
    """
    batch, device = len(states), states.device
    row = torch.arange(batch, device=device)[:, None].expand_as(states)
    keys, inverse = (row * size + states)[mask].unique(return_inverse=True)
    counts = torch.bincount(keys // size, minlength=batch)
    first = counts.cumsum(0) - counts  # position of each row's first key
    column_of_key = torch.arange(len(keys), device=device) - first[keys // size]
    distinct = states.new_zeros((batch, max(1, int(counts.max()))))
    distinct[keys // size, column_of_key] = keys % size
    columns = torch.zeros_like(states)
    columns[mask] = column_of_key[inverse]
    return distinct, columns
