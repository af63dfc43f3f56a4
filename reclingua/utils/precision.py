"""Precision: the dtype of frozen weights, the precision of a test, and TF32 on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reclingua.utils.errors import print_note


def frozen_dtype(device_type: str, bf16: bool, in_4bit: bool) -> str:
    """Return the default dtype of a base model that is not trained.

    On a GPU it is bfloat16 where the training computes in bfloat16 anyway, or where linear layers are nf4: these
    compute in the dtype of their input. Elsewhere it is float32.

    Args:
        device_type: "cuda" or "cpu".
        bf16: whether the training computes in bfloat16 (--bf16).
        in_4bit: whether linear layers have nf4 weights.
    """
    return "bfloat16" if device_type == "cuda" and (bf16 or in_4bit) else "float32"


def has_bf16_instructions(device_type: str) -> bool:
    """Return whether the device has instructions for bfloat16; a CPU without them takes longer than in float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def choose_bf16(given: bool | None, trained_in_bf16: bool, has_instructions: bool) -> bool:
    """Return whether a test computes in bfloat16.

    By default it does where the training did and the device has instructions; a line states where they are missing.

    Args:
        given: --bf16; None: not given.
        trained_in_bf16: of the checkpoint's metadata.
        has_instructions: of the device, see `has_bf16_instructions`.
    """
    if given is not None:
        return given
    if trained_in_bf16 and not has_instructions:
        print_note("trained in bfloat16, measured in float32: no instructions for bfloat16 here; see --bf16")
    return trained_in_bf16 and has_instructions


def allow_tf32(device_type: str) -> None:
    """Let a GPU compute float32 products in TF32; on a CPU this would change the precision of oneDNN."""
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products exactly within the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
