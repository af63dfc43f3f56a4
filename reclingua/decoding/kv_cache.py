"""How the beams of a sample share the KV cache of its prompt: as one query block, or, where a model can't, fanned out.

Both compute the prompt once and then, level by level, the logits after the newest token of every beam.
"""

import logging
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reclingua.decoding.trie import Trie
from reclingua.models.language import MIN_SHARED_PREFIX, accepts_argument, attention_window
from reclingua.utils.errors import InputError
from reclingua.utils.memory import out_of_memory

logger = logging.getLogger(__name__)


class TreeAttentionDecoder:
    """All beams of a sample are one block of queries over one cache; nothing in it is copied or re-ordered.

    Every token that any beam took stays in the cache. Which of them a beam sees, the prompt and its own ancestors, is
    told by a 4-D mask [batch, 1, beams, cached tokens]; where it stands, by its position id.

    Args:
        room: how many tokens the cache will hold for each sample, prompt and beams together.

    An object serves one search.
    """

    def __init__(self, model: PreTrainedModel, room: int):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [PreallocatedLayer(room) for _ in self.cache.layers]

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 1, vocabulary] after prompts padded on the left, int64 [batch, length] with their mask.

        The words with which all prompts begin, those of the instruction, are computed once for all of them.
        """
        batch, length = input_ids.shape
        padding = length - attention_mask.sum(-1, keepdim=True)
        shared = _common_beginning(input_ids, padding)
        if (batch - 1) * shared >= MIN_SHARED_PREFIX:
            words = slice(int(padding[0]), int(padding[0]) + shared)
            _prefill(self.model, input_ids[:1, words], attention_mask[:1, words], self.cache)
            for layer in self.cache.layers:
                layer.repeat(batch)
            # In the cache they stand before the padding: [shared words][padding][rest of the prompt].
            columns = torch.arange(length, device=input_ids.device)
            attention_mask = ((columns < shared) | (columns >= padding + shared)).long()
            input_ids = input_ids[:, shared:]
        output = _prefill(self.model, input_ids, attention_mask, self.cache)
        self.prompt = attention_mask.bool()
        self.positions = length - padding  # of the next token, [batch, 1]
        self.ancestors = input_ids.new_zeros((batch, 1, 0), dtype=torch.bool)
        return output.logits[:, -1:]

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Logits [batch, beams, vocabulary] after one more token of each beam.

        Args:
            tokens: int64 [batch, beams].
            parents: int64 [batch, beams], the beam of the previous call that each one continues.
        """
        batch, beams = tokens.shape
        inherited = self.ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.ancestors.shape[2]))
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        self.ancestors = torch.cat([inherited, itself], dim=2)
        seen = torch.cat([self.prompt.unsqueeze(1).expand(-1, beams, -1), self.ancestors], dim=2)
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill_(~seen, torch.finfo(dtype).min)
        output = self.model(
            input_ids=tokens,
            attention_mask=mask.unsqueeze(1),
            position_ids=self.positions.expand(-1, beams),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return output.logits


class ReplicatedCacheDecoder:
    """Every beam is a row with a copy of its prompt's cache, re-ordered at each level: for any model with a cache."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As in `TreeAttentionDecoder`."""
        output = _prefill(self.model, input_ids, attention_mask, None)
        self.cache, self.mask, self.beams = getattr(output, "past_key_values", None), attention_mask, 1
        if self.cache is None:
            raise InputError(f"{type(self.model).__name__} keeps no key-value cache; the search needs a transformer")
        return output.logits[:, -1:]

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """As in `TreeAttentionDecoder`."""
        batch, beams = tokens.shape
        rows = (torch.arange(batch, device=tokens.device).unsqueeze(1) * self.beams + parents).flatten()
        self.beams = beams
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones((len(rows), 1))], dim=1)
        positions = (
            {"position_ids": self.mask.sum(-1, keepdim=True) - 1}
            if accepts_argument(self.model, "position_ids")
            else {}
        )
        output = self.model(
            input_ids=tokens.reshape(-1, 1),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
        )
        return output.logits.view(batch, beams, -1)


def choose_decoder(
    model: PreTrainedModel, length: int, trie: Trie, num_beams: int
) -> TreeAttentionDecoder | ReplicatedCacheDecoder:
    """For one search: the faster of the two ways that is right for the model.

    Args:
        length: tokens of the longest prompt.
    """
    widths = [min(num_beams, states) for states in trie.level.diff().tolist()]
    room = length + sum(widths[1:-1])  # the root has no token, the last level is not fed
    window = attention_window(model)
    if not window or not _block_is_right(model, room):
        reason = "its beams cannot be computed as one block"
    elif length + trie.depth > window:
        reason = f"a prompt of {length} tokens and an index do not fit into its window of {window:.0f}"
    else:
        return TreeAttentionDecoder(model, room)
    if reason not in _said.setdefault(model, set()):
        _said[model].add(reason)
        logger.warning(
            "%s: %s; every beam gets a copy of its prompt's cache, which is slower and finds the same items",
            *(type(model).__name__, reason),
        )
    return ReplicatedCacheDecoder(model)


_said: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()
_tried: WeakKeyDictionary[PreTrainedModel, dict[int, bool]] = WeakKeyDictionary()  # room -> is a block right?


def _block_is_right(model: PreTrainedModel, room: int) -> bool:
    """Try it once for each size of cache: what no document says of an architecture, a small forward pass does."""
    room = max(64, 1 << (room - 1).bit_length())
    if room not in (tried := _tried.setdefault(model, {})):
        tried[room] = accepts_argument(model, "position_ids") and _try_block(model, room)
    return tried[room]


@torch.no_grad()
def _try_block(model: PreTrainedModel, room: int) -> bool:
    """Many beams of two tokens after a prompt: the first and the last of them as in the block, and without a cache.

    There are as many as the cache will hold, to find out an attention that minds how far apart keys lie in it.
    """
    beams = (room - 4) // 2
    words = torch.arange(4 + 2 * beams, device=model.device) % model.get_input_embeddings().weight.shape[0]
    prompt, first, second = words[None, :4], words[None, 4 : 4 + beams], words[None, 4 + beams :]
    parents = torch.arange(beams, device=model.device).flip(0)[None]
    paths = torch.stack([torch.cat([prompt[0, 1:], first[0, [-1 - at]], second[0, [at]]]) for at in (0, -1)])
    alone = model(input_ids=paths, use_cache=False).logits[:, -1].float()
    ones = torch.ones_like(paths)
    padded = model(  # a second way without a cache: how far apart two right answers may be
        input_ids=torch.cat([paths[:, :1], paths], dim=1),
        attention_mask=torch.cat([0 * ones[:, :1], ones], dim=1),
        position_ids=torch.cat([0 * ones[:, :1], ones.cumsum(1) - 1], dim=1),
        use_cache=False,
    ).logits[:, -1]
    block = TreeAttentionDecoder(model, room)
    try:
        block.prefill(prompt, torch.tensor([[0, 1, 1, 1]], device=model.device))
        block.step(first, torch.zeros_like(first))
        together = block.step(second, parents)[0, [0, -1]]
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        return False  # that is the answer: this architecture wants another kind of mask or cache
    scale = alone.abs().max()
    tolerance = max(5e-3 * scale, 8 * (padded.float() - alone).abs().max())
    return (
        not (together.float() - alone).abs().max() > tolerance
    )  # broken weights pass: the search itself refuses them


def _common_beginning(input_ids: torch.Tensor, padding: torch.Tensor) -> int:
    """With how many tokens all prompts begin, leaving each at least one of its own."""
    most = max(0, input_ids.shape[1] - int(padding.max()) - 1)
    beginnings = input_ids.gather(1, padding + torch.arange(most, device=input_ids.device))
    return int((beginnings == beginnings[:1]).all(0).cumprod(0).sum())


def _prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache | None
):
    """The model's output after `input_ids`; the mask covers what is in the cache before them, too."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    optional = {"position_ids": positions, "logits_to_keep": 1}
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in optional.items() if accepts_argument(model, name)},
    )


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in tensors that have room for all that comes, so that adding copies nothing old.

    For one search: things are added, never re-ordered or taken away.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys = key_states.new_empty((batch, heads, self.room, key_states.shape[3]))
        self.values = value_states.new_empty((batch, heads, self.room, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, old : self.length] = key_states
        self.values[:, :, old : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def repeat(self, batch: int) -> None:
        """Give every sample what the only one has so far."""
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        self.length = 0
        self.is_initialized = False
        self.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))

    def get_seq_length(self) -> int:
        return self.length
