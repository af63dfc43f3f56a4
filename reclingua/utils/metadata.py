"""What every run writes beside its result: how long it took, its flags, the versions."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

METADATA_FILE = "reclingua.json"  # in every checkpoint: how its prompts are made and what it was trained on


def run_metadata(flags: Mapping[str, object], started: float) -> dict:
    """`flags` with their values; `started` is the `time.monotonic()` at which the run began."""
    return {
        "seconds": round(time.monotonic() - started, 1),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
