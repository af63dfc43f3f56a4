"""What every run writes beside its result: how long it took, its flags, the versions."""

import argparse
import time
from pathlib import Path

import torch
import transformers


def run_facts(args: argparse.Namespace, started: float) -> dict:
    """`started` is the `time.monotonic()` at which the run began."""
    return {
        "seconds": round(time.monotonic() - started, 1),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
