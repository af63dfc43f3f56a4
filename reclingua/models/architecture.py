"""A small random copy of a model's architecture, on which probes find out what it computes exactly.

The answer of a probe is then about the architecture alone: half precision, quantised or tuned weights, adapters and
autocast neither hide a difference nor look like one.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from reclingua.utils.memory import out_of_memory
from reclingua.utils.precision import without_tf32

SMALL_VOCABULARY, SMALL_MLP = 256, 128
SPREAD = 3.0  # of the outputs of linear layers: attention prefers some tokens clearly, and not one alone
TOLERANCE = 1e-3  # relative to the largest logit; attention to a wrong token changes logits by more than a tenth


def accepts_argument(model: PreTrainedModel, argument: str) -> bool:
    """Return whether the model's forward has the argument."""
    return argument in inspect.signature(_without_adapter(model).forward).parameters


@contextmanager
def architecture_copy(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Give a float32 model of the same class and config with random weights, two layers, few words and a narrow MLP.

    Heads, positions and the implementation of attention are those of `model`, layers one of each type. The random
    state outside is not changed; autocast and TF32 are off inside.
    """
    base = _without_adapter(model)
    config = copy.deepcopy(base.config)
    text = config.get_text_config(decoder=True)
    text.vocab_size = min(text.vocab_size, SMALL_VOCABULARY)
    text.pad_token_id = config.pad_token_id = None
    if isinstance(getattr(text, "intermediate_size", None), int):
        text.intermediate_size = min(text.intermediate_size, SMALL_MLP)
    if types := getattr(text, "layer_types", None):
        text.layer_types = list(dict.fromkeys(types)) if len(set(types)) > 1 else types[:2]
        text.num_hidden_layers = len(text.layer_types)
    else:
        text.num_hidden_layers = min(text.num_hidden_layers, 2)
    device = model.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        without_tf32(),
    ):
        torch.manual_seed(0)
        small = type(base)(config).float().to(device).eval()
        for weight in small.parameters():
            if weight.ndim > 1:
                weight.normal_(0, SPREAD / weight.shape[-1] ** 0.5)
        yield small


def is_equal(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the logits of an architecture copy differ by no more than float32 computations do."""
    return bool((logits - expected).abs().max() < TOLERANCE * expected.abs().max())


def probe_architecture(model: PreTrainedModel, is_exact: Callable[..., bool], *args) -> bool:
    """Return `is_exact(small, *args)` of the copy of the architecture.

    False where the architecture needs other arguments, another kind of mask or cache.
    """
    with architecture_copy(model) as small:
        try:
            return is_exact(small, *args)
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            if out_of_memory(error):
                raise  # this is no answer about the model
            return False


def _without_adapter(model: PreTrainedModel) -> Any:
    """Return the model, without PEFT's wrapper, whose forward accepts everything."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def supports_packing(model: PreTrainedModel) -> bool:
    """Return whether samples packed into a row, separated by `position_ids` only, do not attend to each other."""
    return probe_architecture(model, _is_packing_exact)


def _is_packing_exact(model: PreTrainedModel) -> bool:
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=model.device)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:]
    alone = model(input_ids=ids[:, 3:], use_cache=False).logits
    return is_equal(packed, alone)
