"""KV caches for beam search: tree attention over one shared cache, or one copy of the cache per beam.

Both decoders compute the prompt once and then, level by level, the logits after the newest token of every beam.
"""

import logging
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reclingua.decoding.trie import Trie
from reclingua.models.architecture import accepts_argument, is_equal, probe_architecture
from reclingua.models.language import MIN_SHARED_PREFIX, attention_window
from reclingua.models.tree_attention import attention_argument
from reclingua.utils.errors import InputError

logger = logging.getLogger(__name__)


class TreeAttentionDecoder:
    """Decoder with tree attention: all beams of a sample are one block of queries over one cache.

    Nothing in the cache is copied or re-ordered. Every token that any beam ever took stays in it, and a 4-D mask
    [batch, 1, beams, cached tokens] lets a beam see the prompt, its ancestors and itself. Position ids tell the depth.
    After two steps of three beams, where beams 0 and 1 of the second step continue beam 2 of the first:

                       cached: prompt    step 1     step 2
                                . p p    a b c      d e f
        beam 0 (prompt c d)     0 1 1    0 0 1      1 0 0
        beam 1 (prompt c e)     0 1 1    0 0 1      0 1 0      parents of step 2 = [2, 2, 0]
        beam 2 (prompt a f)     0 1 1    1 0 0      0 0 1

    A step thus gathers the rows of the parents' ancestors and appends an identity matrix.

    Args:
        capacity: number of tokens that the cache holds for each sample, prompt and beams together.

    An object serves one search.
    """

    def __init__(self, model: PreTrainedModel, capacity: int):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.layers = [PreallocatedLayer(capacity) for _ in self.cache.layers]
        self.cache.layers = [*self.layers]

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, 1, vocabulary] after prompts padded on the left.

        The tokens with which all prompts begin, those of the instruction, are computed once for the whole batch.

        Args:
            input_ids: int64 [batch, length].
            attention_mask: int64 [batch, length], 0 on padding.
        """
        batch, length = input_ids.shape
        padding = length - attention_mask.sum(-1, keepdim=True)
        shared = _common_prefix_length(input_ids, padding)
        if (batch - 1) * shared >= MIN_SHARED_PREFIX:
            prefix = slice(int(padding[0]), int(padding[0]) + shared)
            _forward_prompt(self.model, input_ids[:1, prefix], attention_mask[:1, prefix], self.cache)
            for layer in self.layers:
                layer.repeat(batch)
            # The prefix moves in front of the padding: the cache holds [prefix][padding][rest of the prompt].
            columns = torch.arange(length, device=input_ids.device)
            attention_mask = ((columns < shared) | (columns >= padding + shared)).long()
            input_ids = input_ids[:, shared:]
        output = _forward_prompt(self.model, input_ids, attention_mask, self.cache)
        self.prompt_mask = attention_mask.bool()
        self.positions = length - padding  # of the next token, [batch, 1]
        self.ancestors = input_ids.new_zeros((batch, 1, 0), dtype=torch.bool)
        return output.logits[:, -1:]

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, beams, vocabulary] after one more token of each beam.

        Args:
            tokens: int64 [batch, beams].
            parents: int64 [batch, beams], the beam of the previous call that each beam continues.
        """
        inherited = self.ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.ancestors.shape[2]))
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        self.ancestors = torch.cat([inherited, itself], dim=2)
        logits = self._forward(tokens, self.ancestors, self.positions.expand(tokens.shape))
        self.positions = self.positions + 1
        return logits

    def branch(self, levels: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """Return the logits after each token of a tree below the prompt, by level, in one pass.

        Args:
            levels: the tokens and parents of each level, as for `step`.
        """
        if not levels:
            return []
        positions = [
            (self.positions + depth).expand(tokens.shape) for depth, (tokens, _) in enumerate(levels)
        ]  # of the tokens of a level
        tokens = torch.cat([tokens for tokens, _ in levels], dim=1)
        logits = self._forward(tokens, branch_ancestors(levels), torch.cat(positions, dim=1))
        return list(logits.split([tokens.shape[1] for tokens, _ in levels], dim=1))

    def _forward(self, tokens: torch.Tensor, ancestors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits of tokens that see the prompt and, of the tokens after it, their `ancestors`."""
        visible = torch.cat([self.prompt_mask.unsqueeze(1).expand(-1, tokens.shape[1], -1), ancestors], dim=2)
        output = self.model(
            input_ids=tokens,
            attention_mask=attention_argument(self.model, visible),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits


def branch_ancestors(levels: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return which nodes of a tree each node sees, its ancestors and itself, bool [batch, nodes, nodes].

    Args:
        levels: tokens and parents of each level, as for `TreeAttentionDecoder.step`; at least one level.
    """
    ancestors: list[torch.Tensor] = []
    width, nodes = 0, sum(tokens.shape[1] for tokens, _ in levels)
    for tokens, parents in levels:
        visible = torch.zeros((*tokens.shape, nodes), dtype=torch.bool, device=tokens.device)
        if ancestors:
            visible |= ancestors[-1].gather(1, parents.unsqueeze(-1).expand(-1, -1, nodes))
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        visible[:, columns, width + columns] = True
        ancestors.append(visible)
        width += tokens.shape[1]
    return torch.cat(ancestors, dim=1)


class ReplicatedCacheDecoder:
    """Decoder for any model with a KV cache: every beam is a row with its own copy, re-ordered at each level."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits after the prompts, as `TreeAttentionDecoder.prefill` does."""
        output = _forward_prompt(self.model, input_ids, attention_mask, None)
        self.cache: Any = getattr(output, "past_key_values", None)
        self.mask, self.beams = attention_mask, 1
        if self.cache is None:
            raise InputError(f"{type(self.model).__name__} has no key-value cache; beam search needs a transformer")
        return output.logits[:, -1:]

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Return the logits after one more token, as `TreeAttentionDecoder.step` does."""
        batch, beams = tokens.shape
        rows = (torch.arange(batch, device=tokens.device).unsqueeze(1) * self.beams + parents).flatten()
        self.beams = beams
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones((len(rows), 1))], dim=1)
        optional = {"position_ids": self.mask.sum(-1, keepdim=True) - 1}
        output = self.model(
            input_ids=tokens.reshape(-1, 1),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **_accepted(self.model, optional),
        )
        return output.logits.view(batch, beams, -1)

    def branch(self, levels: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """Return the logits after each token of a tree, as `TreeAttentionDecoder.branch` does, level by level."""
        return [self.step(tokens, parents) for tokens, parents in levels]


class DecoderSelector:
    """Choice of the decoder for the searches with one model; remembers what it probed and warned about.

    Args:
        strategy: "auto", the faster decoder that is exact for the model; "tree" or "replicated", always that one.
    """

    def __init__(self, model: PreTrainedModel, strategy: Literal["auto", "tree", "replicated"] = "auto"):
        self.model, self.strategy = model, strategy
        self._tree_is_exact: dict[int, bool] = {}  # by the capacity of the cache
        self._reported: set[str] = set()

    def select(self, length: int, trie: Trie, num_beams: int) -> TreeAttentionDecoder | ReplicatedCacheDecoder:
        """Return a new decoder for one search.

        Args:
            length: number of tokens of the longest prompt.
        """
        if self.strategy == "replicated":
            return ReplicatedCacheDecoder(self.model)
        beams = [min(num_beams, states) for states in trie.level.diff().tolist()]
        capacity = length + sum(beams[1:-1])  # the root has no token, the tokens of the last level are not fed
        reason = self._reason_against_tree(length, trie, capacity) if self.strategy == "auto" else None
        if reason is None:
            return TreeAttentionDecoder(self.model, capacity)
        if reason not in self._reported:
            self._reported.add(reason)
            logger.warning(
                "%s: %s; every beam gets a copy of the prompt's KV cache, which is slower and finds the same items",
                *(type(self.model).__name__, reason),
            )
        return ReplicatedCacheDecoder(self.model)

    def _reason_against_tree(self, length: int, trie: Trie, capacity: int) -> str | None:
        window = attention_window(self.model)
        if not window or not self._supports_tree(capacity):
            return "the model does not support tree attention"
        if length + trie.depth > window:
            return f"a prompt of {length} tokens and a semantic ID exceed its attention window of {window:.0f}"
        return None

    def _supports_tree(self, capacity: int) -> bool:
        """Return whether tree attention is exact for this architecture, by one trial for each power of two."""
        capacity = max(64, 1 << (capacity - 1).bit_length())
        if capacity not in self._tree_is_exact:
            has_positions = accepts_argument(self.model, "position_ids")
            exact = has_positions and probe_architecture(self.model, _is_tree_exact, capacity)
            self._tree_is_exact[capacity] = exact
        return self._tree_is_exact[capacity]


def _is_tree_exact(model: PreTrainedModel, capacity: int) -> bool:
    """Return whether the first and the last of many beams get the same logits from a tree as without a cache.

    No configuration states whether an architecture honours 4-D masks, so a small forward pass finds out: a prompt of
    four tokens and two steps of as many beams as the cache holds, since some attentions depend on the distance of the
    keys in it (Bloom's ALiBi, local layers).
    """
    beams = (capacity - 4) // 2
    embedding: Any = model.get_input_embeddings()
    ids = torch.arange(4 + 2 * beams, device=model.device) % len(embedding.weight)
    prompt, first, second = ids[None, :4], ids[None, 4 : 4 + beams], ids[None, 4 + beams :]
    parents = torch.arange(beams, device=model.device).flip(0)[None]
    paths = torch.stack([torch.cat([prompt[0, 1:], first[0, [-1 - beam]], second[0, [beam]]]) for beam in (0, -1)])
    expected = model(input_ids=paths, use_cache=False).logits[:, -1]
    decoder = TreeAttentionDecoder(model, capacity)
    decoder.prefill(prompt, torch.tensor([[0, 1, 1, 1]], device=model.device))
    decoder.step(first, torch.zeros_like(first))
    return is_equal(decoder.step(second, parents)[0, [0, -1]], expected)


def _common_prefix_length(input_ids: torch.Tensor, padding: torch.Tensor) -> int:
    """Return the number of tokens with which all prompts begin, leaving each at least one of its own."""
    longest = max(0, input_ids.shape[1] - int(padding.max()) - 1)
    prefixes = input_ids.gather(1, padding + torch.arange(longest, device=input_ids.device))
    return int((prefixes == prefixes[:1]).all(0).cumprod(0).sum())


def _forward_prompt(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache | None
) -> Any:
    """Return the model's output after `input_ids`; the mask covers what the cache holds before them, too."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    optional = {"position_ids": positions, "logits_to_keep": 1}
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
        **_accepted(model, optional),
    )


def _accepted(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if accepts_argument(model, name)}


class PreallocatedLayer(DynamicLayer):
    """Cache layer with keys and values in tensors of fixed size, so that appending copies no older ones.

    It serves one search: keys and values are appended, never re-ordered or removed.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys = key_states.new_empty((batch, heads, self.capacity, key_states.shape[3]))
        self.values = value_states.new_empty((batch, heads, self.capacity, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def repeat(self, batch: int) -> None:
        """Expand the cache of one sample to `batch` samples."""
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        self.length = 0
        self.is_initialized = False
        self.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))

    def get_seq_length(self) -> int:
        return self.length
