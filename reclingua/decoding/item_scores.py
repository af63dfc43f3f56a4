"""Exact scores of given items: all candidates of a sample are branches behind its prompt, in one pass.

`score_items` computes them over the prompt's KV cache, for inference. `token_log_probs` computes prompt and branches
as one sequence, with gradients through both, for training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from reclingua.decoding.beam_search import SCORE_OVER, log_normaliser
from reclingua.decoding.kv_cache import DecoderSelector, branch_ancestors
from reclingua.decoding.trie import Trie
from reclingua.models.architecture import accepts_argument
from reclingua.models.tree_attention import attention_argument
from reclingua.utils.errors import InputError


@dataclass(frozen=True)
class CandidateTree:
    """The part of a trie that the candidates of each sample form.

    Its inner states are fed once each, whatever the number of candidates below them:

        candidates        states fed         scored
        A = (5, 7)        (5)                token 5 and 6 after the prompt
        B = (5, 9)        (6)                token 7 and 9 after (5)
        C = (6, 7)                           token 7 after (6)

    Args:
        paths: the state of each candidate's path at each level, 0 to the depth, int64 [batch, candidates]; -1: none.
        inner: the inner states of each level, 0 to depth - 1, int64 [batch, states]; at level 0 the root.
        columns: the column of each candidate's state among them, int64 [batch, candidates].
        levels: tokens and parents of the inner states below the root, as a decoder's `branch` takes them.
    """

    paths: list[torch.Tensor]
    inner: list[torch.Tensor]
    columns: list[torch.Tensor]
    levels: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def build(cls, trie: Trie, items: torch.Tensor) -> "CandidateTree":
        """Return the tree of `items`, item numbers, int64 [batch, candidates], -1 for none."""
        paths = trie.paths(items)
        columns = [torch.zeros_like(items)]  # at level 0 every candidate is below the root
        inner: list[torch.Tensor] = [items.new_zeros((len(items), 1))]
        levels: list[tuple[torch.Tensor, torch.Tensor]] = []
        for level in range(1, trie.depth):
            is_inner = paths[level + 1] >= 0
            fed, column = _distinct(paths[level], is_inner, len(trie.token))
            width = fed.shape[1]  # a column more takes what complete candidates would write
            parents = fed.new_zeros((len(fed), width + 1)).scatter_(1, column.where(is_inner, width), columns[-1])
            levels.append((trie.token[fed].long().clamp(min=0), parents[:, :width]))
            inner.append(fed)
            columns.append(column)
        return cls(paths, inner, columns, levels)

    @property
    def num_nodes(self) -> int:
        """Number of states that are fed for each sample."""
        return sum(tokens.shape[1] for tokens, _ in self.levels)

    def log_probs(self, logits: list[torch.Tensor], trie: Trie, score_over: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability of each token of each candidate, and whether the token exists.

        Args:
            logits: after the inner states of each level, [batch, states, vocabulary].

        Returns:
            float32 and bool [batch, candidates, depth]; 0 where no token exists.
        """
        rows = torch.arange(len(self.paths[0]), device=logits[0].device)[:, None]
        gains = []
        for level, (values, fed, column) in enumerate(zip(logits, self.inner, self.columns, strict=True)):
            if score_over == "vocabulary":
                normaliser = log_normaliser(values)[:, :, 0]
            else:
                children, exists = trie.children(fed, level)
                of_children = values.gather(2, trie.token[children].long().clamp(min=0)).float()
                normaliser = of_children.masked_fill(~exists, -torch.inf).logsumexp(2)
            tokens = trie.token[self.paths[level + 1].clamp(min=0)].long().clamp(min=0)
            gains.append(values[rows, column, tokens].float() - normaliser.gather(1, column))
        exists = torch.stack(self.paths[1:], dim=2) >= 0
        return torch.stack(gains, dim=2).masked_fill(~exists, 0), exists


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

    Args:
        model, input_ids, attention_mask, trie, score_over, selector: as in `beam_search`.
        items: int64 [batch, candidates], item numbers of the trie, -1 for none.

    Returns:
        float32 [batch, candidates], -inf for -1.

    Raises:
        InputError: the model's scores are not finite.
    """
    _check_mode(model, score_over)
    tree = CandidateTree.build(trie, items)
    decoder = (selector or DecoderSelector(model)).select(input_ids.shape[1], trie, tree.num_nodes)
    logits = [decoder.prefill(input_ids, attention_mask), *decoder.branch(tree.levels)]
    scores = tree.log_probs(logits, trie, score_over)[0].sum(2)
    if not scores.isfinite().all():
        raise InputError("the model's scores are not finite: its weights are broken, or its dtype is too narrow")
    return scores.masked_fill(items < 0, -torch.inf)


def token_log_probs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    trie: Trie,
    items: torch.Tensor,
    score_over: str = "vocabulary",
    forward: Callable[..., Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each token of each item's semantic ID, with gradients; their sum is the score.

    Prompt and branches are one sequence, so that one call of the model computes them, which DDP needs:

                   . p p   a b c        a, b: tokens of level 1; c: token of level 2, below b
        p          0 1 1   0 0 0
        a          0 1 1   1 0 0
        c          0 1 1   0 1 1

    Args:
        model, input_ids, attention_mask, trie, items, score_over: as in `score_items`. The model's attention has to
            support such masks (`reclingua.models.tree_attention.supports_trees`).
        forward: what is called to compute the model's output, such as its DDP wrapper (default: the model).

    Returns:
        float32 and bool [batch, candidates, depth]: log-probabilities, and whether the token exists.
    """
    _check_mode(model, score_over)
    tree = CandidateTree.build(trie, items)
    length, nodes = input_ids.shape[1], tree.num_nodes
    is_token = attention_mask.bool()
    visible = torch.zeros((len(items), length + nodes, length + nodes), dtype=torch.bool, device=items.device)
    visible[:, :length, :length] = torch.ones_like(visible[0, :length, :length]).tril() & is_token[:, None]
    positions = [(attention_mask.cumsum(-1) - 1).clamp(min=0)]
    if nodes:
        visible[:, length:, :length] = is_token[:, None]
        visible[:, length:, length:] = branch_ancestors(tree.levels)
        count = attention_mask.sum(-1, keepdim=True)
        positions += [(count + depth).expand(tokens.shape) for depth, (tokens, _) in enumerate(tree.levels)]
    columns = torch.arange(length + nodes, device=items.device)
    visible[:, columns, columns] = True  # padding sees itself: a softmax over nothing would be NaN
    keep = {"logits_to_keep": nodes + 1} if accepts_argument(model, "logits_to_keep") else {}
    output = (forward or model)(
        input_ids=torch.cat([input_ids, *(tokens for tokens, _ in tree.levels)], dim=1),
        attention_mask=attention_argument(model, visible),
        position_ids=torch.cat(positions, dim=1),
        use_cache=False,
        **keep,
    )
    widths = [1, *(tokens.shape[1] for tokens, _ in tree.levels)]
    logits = list(output.logits[:, -nodes - 1 :].split(widths, dim=1))
    return tree.log_probs(logits, trie, score_over)


def _check_mode(model: PreTrainedModel, score_over: str) -> None:
    if model.training or score_over not in SCORE_OVER:
        raise ValueError(
            f"model.training {model.training}, score_over {score_over!r}: should be False, and one of {SCORE_OVER}"
        )


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
