"""Tree attention over prompts: many questions behind one trunk, each of which sees the trunk up to its own time.

One sequence holds a trunk and one branch a question. With two branches, of which the first sees one token less:

                trunk        branch 1   branch 2
                t0 t1 t2     a0 a1      b0 b1
        t2      x  x  x
        a0      x  x         x                       visible = 2, position 2
        a1      x  x         x  x                    visible = 2, position 3
        b0      x  x  x                 x            visible = 3, position 3
        b1      x  x  x                 x  x         visible = 3, position 4

The logits after each branch equal those of its prompt alone, since the mask and the position ids are the same.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from reclingua.models.architecture import accepts_argument, is_equal, probe_architecture
from reclingua.models.language import attention_window, context_length

PROBE_TOKENS = 300  # between trunk and branch: some local layers count places in the sequence


def tree_mask(branch: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return which keys each query sees, bool [batch, length, length].

    Args:
        branch: int64 [batch, length]; 0 in the trunk, the number of the branch elsewhere, -1 on padding.
        visible: int64 [batch, length], number of tokens of the trunk that a token of a branch sees.
    """
    columns = torch.arange(branch.shape[1], device=branch.device)
    is_earlier = columns <= columns[:, None]
    return is_earlier & ((branch[:, :, None] == branch[:, None, :]) | (columns < visible[:, :, None]))


def attention_argument(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """Return a mask, bool [batch, queries, keys], as the `attention_mask` [batch, 1, queries, keys] of the model.

    SDPA takes booleans; other implementations add the mask to the attention scores.
    """
    mask = mask.unsqueeze(1)
    if model.config._attn_implementation == "sdpa":
        return mask
    zeros = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(model.dtype).min)


def supports_trees(model: PreTrainedModel) -> bool:
    """Return whether tree attention is exact for a language model, by one small trial of its architecture.

    No configuration states whether an architecture honours 4-D masks and position ids. The trial has two branches, the
    first of which is long, and compares the logits after the second with those of its prompt alone.
    """
    if attention_window(model) < float("inf") or not accepts_argument(model, "position_ids"):
        return False
    return probe_architecture(model, _is_tree_exact)


def _is_tree_exact(model: PreTrainedModel) -> bool:
    limit = context_length(model) or PROBE_TOKENS + 8
    lengths = (4, max(1, min(PROBE_TOKENS, limit - 8)), 4)
    branch = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    positions = torch.cat([torch.arange(4), 4 + torch.arange(lengths[1]), 4 + torch.arange(4)])
    embedding: Any = model.get_input_embeddings()
    ids = torch.arange(len(branch)) % len(embedding.weight)
    prompt = torch.cat([ids[:4], ids[-4:]])
    branch, positions, ids, prompt = (tensor[None].to(model.device) for tensor in (branch, positions, ids, prompt))
    mask = attention_argument(model, tree_mask(branch, 4 * (branch > 0).long()))
    tree = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0, -1]
    return is_equal(tree, model(input_ids=prompt, use_cache=False).logits[0, -1])
