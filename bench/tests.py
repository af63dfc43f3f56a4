"""Time the test suite, all of it and the quick part: how long does a contributor wait?

python -m bench.tests
"""

import subprocess
import time
from pathlib import Path

import torch

from bench.common import write_results
from reclingua.utils.errors import InputError, cli_main

ROOT = Path(__file__).parents[1]


def time_tests(*flags: str) -> float:
    """Return the seconds of `bash tests/run.sh` with these flags; InputError if a test fails."""
    started = time.perf_counter()
    if subprocess.run(["bash", "tests/run.sh", *flags], cwd=ROOT).returncode:
        raise InputError(f"bash tests/run.sh {' '.join(flags)}: a test failed, so its time is none")
    return time.perf_counter() - started


@cli_main
def main() -> None:
    figures = {"quick_seconds": time_tests("--quick"), "seconds": time_tests()}
    print(f"quick {figures['quick_seconds']:.0f} s, all {figures['seconds']:.0f} s")
    write_results("tests", torch.device("cpu"), figures)


if __name__ == "__main__":
    main()
