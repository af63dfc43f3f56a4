"""The loss of the labels alone: the plain loss and its gradients, for every kind of output head."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from reclingua.datasets.collators import IGNORE
from reclingua.models.chunked_loss import ChunkedCrossEntropy
from tests.helpers.models import make_model

SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
CHANGED = {  # models that do something to the logits after their head
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=16, final_logit_softcapping=3.0, **SIZE)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **SIZE)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(logit_scale=0.5, **SIZE)),
}


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (4, 21), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, IGNORE)
    labels[2] = IGNORE  # a sample without any
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def losses(model, **context):
    """(loss, gradients) in the plain way and in ours, of the same model."""
    inputs, labels = batch()
    count = (labels[:, 1:] != IGNORE).sum()
    head = ChunkedCrossEntropy(model, 1)
    head.chunk = 3  # so few rows that there are several chunks, the last not full
    results = []
    for way in ("plain", "ours"):
        model.zero_grad()
        with torch.autocast("cpu", **context) if context else torch.enable_grad():
            if way == "plain":
                logits = model(**inputs).logits[:, :-1].float()
                loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
            else:
                with head.at_labels(labels):
                    model(**inputs)
                loss = head.loss / count
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    return results


def assert_equal_ways(model, tolerance=1e-5, **context):
    (plain, expected), (ours, gradients) = losses(model, **context)
    assert ours == pytest.approx(plain, rel=tolerance)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance * largest)


def test_equals_the_plain_loss(architecture):
    assert_equal_ways(make_model(architecture, 300, spread=1))


@pytest.mark.parametrize("name", CHANGED)
def test_equals_the_plain_loss_where_logits_are_scaled_or_capped(name):
    torch.manual_seed(0)
    assert_equal_ways(CHANGED[name]())


def test_with_a_bias_and_with_frozen_parts():
    model = make_model("llama", 300, spread=1)
    model.lm_head = torch.nn.Linear(32, 300, bias=True)
    assert_equal_ways(model)
    model.lm_head.requires_grad_(False)
    assert_equal_ways(model)
    model.model.requires_grad_(False)
    model.lm_head.bias.requires_grad_(True)
    assert_equal_ways(model)


@pytest.mark.parametrize("architecture_", ["llama-tied", "gpt2"])
def test_equals_the_plain_loss_in_bfloat16(architecture_):
    assert_equal_ways(make_model(architecture_, 300, spread=1), tolerance=2e-2, dtype=torch.bfloat16)


def test_the_head_is_itself_again_and_evaluation_keeps_no_gradients():
    model = make_model("llama-tied", 300, spread=1)
    inputs, labels = batch()
    before = model(**inputs).logits
    head = ChunkedCrossEntropy(model, 1)
    with torch.no_grad(), head.at_labels(labels):
        model(**inputs)
    assert not head.loss.requires_grad
    with pytest.raises(IndexError), head.at_labels(labels):
        model(input_ids=torch.zeros(1, 100, dtype=torch.long))  # labels of another batch: any failure will do
    assert torch.equal(model(**inputs).logits, before)


class LogitSizes(TorchDispatchMode):
    """The sizes in bytes of all tensors made that have a row of the vocabulary's length; the weight turned has 32."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.bytes = vocabulary, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,) and len(tensor) != 32:
                self.bytes.append(tensor.numel() * tensor.element_size())
        return made


def test_logits_stay_within_the_memory_given():
    model = make_model("llama", 50_000, spread=1)
    inputs, labels = batch()
    head = ChunkedCrossEntropy(model, 2)
    with LogitSizes(50_000) as sizes, head.at_labels(labels):
        model(**inputs)
        head.loss.backward()
    # Four such tensors are alive at a time: logits, their log-probabilities, the gradients of both.
    assert 4 * max(sizes.bytes) <= 2 * 2**20 and len(sizes.bytes) > 4 * 5


def with_logits_of_its_own(model):
    """The model, with something done to its logits that no config tells of."""
    forward = model.forward

    def twisted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + 1
        return output

    model.forward = twisted
    return model


def test_a_model_with_logits_of_its_own_is_found_out():
    with pytest.raises(ValueError, match="in an unknown way"):
        ChunkedCrossEntropy(with_logits_of_its_own(make_model("llama", 300, spread=1)), 1)
