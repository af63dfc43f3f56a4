"""The precision of a training is that of its test, unless a flag states another."""

import json

import pytest
import torch

import finetune
import test as test_script
from reclingua import Scorer
from reclingua.models import yes_no
from reclingua.utils.metadata import CheckpointMetadata
from reclingua.utils.precision import has_bf16_instructions
from tests.helpers.scripts import flags, run_main, tune

SHORT = ("--max_steps", 1, "--save_and_eval_strategy", "no")


class LinearLayers(torch.overrides.TorchFunctionMode):
    """Whether autocast was on at each linear layer that was computed in the context."""

    def __init__(self):
        super().__init__()
        self.autocast = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            self.autocast.append(torch.is_autocast_enabled("cpu"))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=["lcrec", "tallrec"])
def in_bf16(request, workshop, studio, tmp_path_factory):
    """Checkpoints that were trained with --bf16 and their data."""
    out = tmp_path_factory.mktemp("half") / request.param
    if request.param == "lcrec":
        run_main(finetune.main, *flags(workshop, out, *SHORT, "--bf16"))
        return out, workshop / "datasets"
    run_main(finetune.main, *tune(studio, "tallrec", out, "--base_model", workshop / "base", *SHORT, "--bf16"))
    return out, studio


def test_a_test_takes_the_precision_of_the_training(script, in_bf16, tmp_path):
    folder, data = in_bf16
    metadata = CheckpointMetadata.load(folder)
    assert metadata.bf16 and metadata.base_dtype == "float32"  # a frozen base is half on a GPU only
    expected = {(): has_bf16_instructions("cpu"), ("--bf16", "False"): False, ("--bf16",): True}
    for more, bf16 in expected.items():
        results = tmp_path / "results.json"
        where = ("--ckpt_path", folder, "--data_path", data, "--results_file", results, "--sample_num", 20)
        with LinearLayers() as layers:
            code, out, error = script(test_script.main, *where, *more)
        assert code == 0, error
        assert json.loads(results.read_text())["arguments"]["bf16"] is bf16
        assert any(layers.autocast) == bf16  # probes of the architecture compute without autocast
        assert ("measured in float32" in out) == (not more and not bf16)


def test_a_training_resumes_in_another_precision(script, workshop, tmp_path):
    short = ("--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "no")
    command = flags(workshop, tmp_path / "out", *short)
    assert script(finetune.main, *command, "--max_steps", 1)[0] == 0
    assert not CheckpointMetadata.load(tmp_path / "out/checkpoint-1").bf16
    code, out, error = script(finetune.main, *command, "--max_steps", 2, "--bf16", "--resume_from_checkpoint", "auto")
    assert code == 0 and "resuming from" in out, error
    assert CheckpointMetadata.load(tmp_path / "out").bf16


def test_weights_in_4_bits_go_to_the_device_of_the_model(studio, monkeypatch):
    """--gpu_id is the device of Scorer.from_pretrained; without a GPU the argument shows that it is handed down."""
    devices, load = [], yes_no.load_model

    def load_and_record(*args, device=None, **options):
        devices.append(device)
        return load(*args, device=device, **options)

    monkeypatch.setattr(yes_no, "load_model", load_and_record)
    scorer = Scorer.from_pretrained(studio / "tallrec", studio, device="cpu")
    scorer.untuned()
    assert devices == [torch.device("cpu")] * 2
