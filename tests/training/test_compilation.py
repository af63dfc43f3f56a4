"""--torch_compile: the layers are compiled in training alone, and nothing else changes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import finetune
from reclingua.models.lora import add_lora_adapter
from reclingua.training.compilation import check_compiler, compile_layers, without_compilation
from reclingua.utils.errors import InputError
from tests.helpers.models import make_model
from tests.helpers.scripts import flags, tune

STEPS = ("--max_steps", 4, "--logging_steps", 1, "--save_and_eval_strategy", "epoch")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def losses(folder):
    return [line["loss"] for line in json.loads((folder / "run.json").read_text())["log"] if "loss" in line]


@needs_compiler
@pytest.mark.parametrize("method", ["lcrec", "tallrec"])
def test_a_compiled_training_is_the_same(script, workshop, studio, tmp_path, method):
    torch._dynamo.reset()
    counters.clear()
    for name, more in (("plain", ()), ("compiled", ("--torch_compile",))):
        if method == "lcrec":
            command = flags(workshop, tmp_path / name, *STEPS, *more)
        else:
            base = ("--base_model", workshop / "base", "--lora_dropout", 0)
            command = tune(studio, "tallrec", tmp_path / name, *base, *STEPS, *more)
        code, out, error = script(finetune.main, *command)
        assert code == 0 and "valid " in out, error
        assert bool(counters["stats"]) == (name == "compiled")
    # Batches of several shapes, and the trees of Yes/No rows, share graphs; evaluation adds none.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert len(plain) == 4 and compiled == pytest.approx(plain, abs=1e-4)
    weights, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert weights.keys() == ours.keys()
    assert json.loads((tmp_path / "compiled/run.json").read_text())["arguments"]["torch_compile"] is True


def test_layers_run_as_they_are_outside_of_training():
    model = make_model("gpt2", 64, spread=1)
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    keys, ids = [*model.state_dict()], torch.arange(6)[None]
    expected = model(input_ids=ids).logits
    assert compile_layers(model) == 2 and [*model.state_dict()] == keys
    for layer in model.transformer.h:
        layer.compile(dynamic=True, backend=backend)
    with without_compilation():
        assert torch.equal(model(input_ids=ids).logits, expected) and not calls
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-5) and calls


def test_what_cannot_be_compiled_is_refused(refused, workshop, studio, tmp_path, monkeypatch):
    command = tune(studio, "collm", tmp_path / "out", "--init_from", studio / "tallrec", "--torch_compile")
    assert "reads histories into a cache" in refused(finetune.main, *command)
    adapter = add_lora_adapter(make_model("llama", 64), [60, 61], 4, 8, 0, ["q_proj"])
    assert compile_layers(adapter) == 2
    model = make_model("llama", 64)
    model._no_split_modules = None
    with pytest.raises(InputError, match="does not state what its decoder layers are"):
        compile_layers(model)
    quantised = make_model("llama", 64)
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="not for weights in 4 or 8 bits"):
        compile_layers(quantised)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="needs a C"):
        check_compiler()
    assert "install g++" in refused(finetune.main, *flags(workshop, tmp_path / "out", "--torch_compile"))
