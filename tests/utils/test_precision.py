"""The decisions on precision, for devices that need not be at hand."""

import pytest
import torch

from reclingua.models.architecture import architecture_copy
from reclingua.utils.precision import allow_tf32, choose_bf16, frozen_dtype, has_bf16_instructions, without_tf32
from tests.helpers.models import make_model


@pytest.fixture
def exact_products():
    """The precision of float32 products is that of before after the test."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "device, bf16, in_4bit, dtype",
    [
        ("cuda", True, False, "bfloat16"),
        ("cuda", False, True, "bfloat16"),
        ("cuda", False, False, "float32"),
        ("cpu", True, True, "float32"),
    ],
)
def test_a_frozen_base_is_bfloat16_on_a_gpu_that_computes_so(device, bf16, in_4bit, dtype):
    assert frozen_dtype(device, bf16, in_4bit) == dtype


def test_a_test_computes_as_the_training_did(capsys):
    assert choose_bf16(None, True, has_instructions=True) and not choose_bf16(None, False, has_instructions=True)
    assert choose_bf16(True, False, has_instructions=False) and not choose_bf16(False, True, has_instructions=True)
    assert capsys.readouterr().out == ""
    assert not choose_bf16(None, True, has_instructions=False)
    assert "measured in float32: no instructions for bfloat16" in capsys.readouterr().out


def test_instructions_are_those_of_the_processor():
    flags = next(line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features"))).split()
    assert has_bf16_instructions("cpu") == bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & {*flags})


def test_tf32_is_for_gpus_and_not_for_probes(exact_products):
    torch.set_float32_matmul_precision("highest")
    allow_tf32("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    allow_tf32("cuda")
    assert torch.get_float32_matmul_precision() == "high"
    with without_tf32():
        assert torch.get_float32_matmul_precision() == "highest"
    with architecture_copy(make_model("llama", 64)):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
