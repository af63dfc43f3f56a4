"""Items sampled without replacement from the constrained distribution: stochastic beam search."""

import torch
from transformers import PreTrainedModel

from reclingua.decoding.kv_cache import DecoderSelector
from reclingua.decoding.trie import Trie
from reclingua.utils.errors import InputError


@torch.no_grad()
def sample_items(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    count: int,
    generator: torch.Generator,
    excluded: torch.Tensor | None = None,
    selector: DecoderSelector | None = None,
) -> torch.Tensor:
    """Return `count` different items of each sample, drawn one after another without putting any back.

    Kool et al., Stochastic Beams and Where to Find Them (ICML 2019, arXiv 1903.06059, algorithm 1). An item's
    log-probability plus Gumbel noise is its key; the items with the largest keys are such a draw. A state's key is the
    largest key of the items below it, so the beam needs no other items: the keys of its children are drawn such that
    their largest one is the key of the state.

    Probabilities are normalised over the tokens that can follow in the trie, without those that lead to excluded
    items alone.

    Args:
        model, input_ids, attention_mask, trie, excluded, selector: as in `beam_search`.
        count: number of items; fewer are drawn where fewer are left.
        generator: of the noise, on the model's device.

    Returns:
        item numbers, int64 [batch, count], in the order of their keys, -1 where no item is left.

    Raises:
        InputError: the model's scores are not finite.
    """
    decoder = (selector or DecoderSelector(model)).select(input_ids.shape[1], trie, count)
    exhausted = trie.exhausted_states(excluded) if excluded is not None else None
    batch, device = len(input_ids), input_ids.device
    states = torch.zeros((batch, 1), dtype=torch.int64, device=device)
    log_probs = torch.zeros((batch, 1), device=device)  # of each beam, -inf: no beam
    keys = torch.zeros((batch, 1), device=device)  # the root's own noise would shift all keys alike
    items = torch.full((batch, count), -1, device=device)
    item_keys = torch.full((batch, count), -torch.inf, device=device)
    logits = decoder.prefill(input_ids, attention_mask)
    for level in range(trie.depth):
        children, exists = trie.children(states, level)
        if exhausted is not None:
            exists &= ~trie.is_exhausted(children, exhausted)
        exists &= (log_probs > -torch.inf).unsqueeze(2)
        gains = logits.gather(2, trie.token[children].long()).float()
        if not gains.masked_fill(~exists, 0).isfinite().all():
            raise InputError("the model's scores are not finite: its weights are broken, or its dtype is too narrow")
        gains = gains.masked_fill(~exists, -torch.inf)
        gains = gains - gains.logsumexp(2, keepdim=True)
        values = (log_probs.unsqueeze(2) + gains).masked_fill(~exists, -torch.inf)
        noise = -torch.empty_like(values).exponential_(generator=generator).log()
        child_keys = _condition_on_maximum((values + noise), keys.unsqueeze(2)).masked_fill(~exists, -torch.inf)

        children, values, child_keys = children.flatten(1), values.flatten(1), child_keys.flatten(1)
        complete = trie.item[children].long()
        # A complete item keeps its key and competes with what the beam still leads to.
        item_keys, order = torch.cat([item_keys, child_keys.masked_fill(complete < 0, -torch.inf)], dim=1).topk(count)
        items = torch.cat([items, complete], dim=1).gather(1, order).masked_fill(item_keys.isneginf(), -1)
        width = min(count, children.shape[1])
        keys, order = child_keys.masked_fill(complete >= 0, -torch.inf).topk(width)
        beams = int((keys > -torch.inf).any(0).sum())
        if not beams:
            break
        keys, order = keys[:, :beams], order[:, :beams]
        log_probs = values.gather(1, order).masked_fill(keys.isneginf(), -torch.inf)
        states = children.gather(1, order)
        logits = decoder.step(trie.token[states].long().clamp(min=0), parents=order // trie.width[level])
    return items


def _condition_on_maximum(keys: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Return Gumbel variables [..., children] as they are if their largest is `maximum` [..., 1].

    Appendix B.3 of the paper, in the form that no difference of large numbers enters.
    """
    largest = keys.amax(-1, keepdim=True)
    largest = largest.where(largest > -torch.inf, 0)
    difference = maximum - keys + torch.log1p(-(keys - largest).exp().clamp(max=1))
    return maximum - difference.clamp(min=0) - torch.log1p((-difference.abs()).exp())
