"""Helpers of the benchmarks: Instruments without duplicate semantic IDs, peak memory, the results file."""

import json
import os
import platform
import sys
from pathlib import Path

import accelerate
import numpy
import torch
import transformers

from reclingua.utils.errors import mask_flags
from reclingua.utils.files import output_folder, read_json, write_json

RESULTS = Path(__file__).parent / "results"


def remove_duplicates(data_path: Path, name: str, output: Path) -> int:
    """Copy dataset `name` to `output` without items that share another item's semantic ID; return how many these are.

    The published index of Instruments gives some semantic IDs to two items. All sides get the same items.
    """
    folder = data_path / name
    index = read_json(folder / f"{name}.index.json", "item -> list of code tokens")
    histories = read_json(folder / f"{name}.inter.json", "user -> list of items in time order")
    first: dict[str, str] = {}
    for item, codes in index.items():
        first.setdefault("".join(codes), item)
    unique = set(first.values())
    output_folder(output / name)
    write_json(output / name / f"{name}.index.json", {item: index[item] for item in index if item in unique})
    write_json(
        output / name / f"{name}.inter.json",
        {user: rest for user, items in histories.items() if (rest := [i for i in items if str(i) in unique])},
    )
    return len(index) - len(unique)


class Peak:
    """Context that measures memory, MB: `before` in use at its start, `mb` at most; on a CPU of the whole process."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the high-water mark
            self.before = process_mb("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self.mb = process_mb("VmHWM")


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle, before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_mb(kind: str, process: int | str = "self") -> float:
    """Return the memory of a process, MB: VmRSS resident now, VmHWM the high-water mark; 0 once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(kind)), 0) / 2**10


def results_path(name: str, device: torch.device) -> Path:
    """Return bench/results/<name>.json, or <name>-gpu.json if a GPU is used."""
    return RESULTS / f"{name}{'-gpu' if device.type == 'cuda' else ''}.json"


def earlier_figures(name: str, device: torch.device) -> dict:
    """Return the figures of an earlier run, for a benchmark whose parts run one by one."""
    path = results_path(name, device)
    figures = read_json(path, "the last results") if path.exists() else {}
    return {key: value for key, value in figures.items() if key not in ("command", "machine", "versions")}


def write_results(name: str, device: torch.device, figures: dict) -> Path:
    """Write machine, versions, command and figures to the results file; return its path."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    path = results_path(name, device)
    content = {
        "command": " ".join(["python", "-m", f"bench.{name}", *mask_flags(sys.argv[1:])]),
        "machine": {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, accelerate, numpy)},
        },
        **figures,
    }
    write_json(path, json.loads(json.dumps(content, default=str)), indent=1)
    return path


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
