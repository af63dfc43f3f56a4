"""What the benchmarks share: Instruments without twins, peak memory, and the file of results."""

import json
import os
import platform
import sys
from pathlib import Path

import accelerate
import numpy
import torch
import transformers

from reclingua.utils.files import output_folder, read_json, write_json

RESULTS = Path(__file__).parent / "results"


def remove_duplicates(data_path: Path, name: str, output: Path) -> int:
    """Copy dataset `name` to `output`, leaving out items that have another item's index; returns how many.

    The published index of Instruments gives some indices to two items. Every way of searching gets the same items.
    """
    folder = data_path / name
    index = read_json(folder / f"{name}.index.json", "item -> list of code tokens")
    histories = read_json(folder / f"{name}.inter.json", "user -> list of items in time order")
    first: dict[str, str] = {}
    for item, codes in index.items():
        first.setdefault("".join(codes), item)
    kept = set(first.values())
    output_folder(output / name)
    write_json(output / name / f"{name}.index.json", {item: index[item] for item in index if item in kept})
    write_json(
        output / name / f"{name}.inter.json",
        {user: left for user, items in histories.items() if (left := [i for i in items if str(i) in kept])},
    )
    return len(index) - len(kept)


class Peak:
    """`with Peak(device) as peak: ...`: MB in use `before` and at most, `mb`; on the CPU of the whole process."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: begin a new high-water mark
            self.before = process_mb("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self.mb = process_mb("VmHWM")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_mb(kind: str, process: int | str = "self") -> float:
    """Memory of a process, MB, as Linux has it: VmRSS resident now, VmHWM the most since the mark; 0 once it ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(kind)), 0) / 2**10


def results_path(name: str, device: torch.device) -> Path:
    """bench/results/<name>.json, with -gpu in the name where one was used."""
    return RESULTS / f"{name}{'-gpu' if device.type == 'cuda' else ''}.json"


def last_figures(name: str, device: torch.device) -> dict:
    """What an earlier run left in the file of results, for a benchmark whose parts are run one by one."""
    path = results_path(name, device)
    figures = read_json(path, "the last results") if path.exists() else {}
    return {key: value for key, value in figures.items() if key not in ("command", "machine", "versions")}


def write_results(name: str, device: torch.device, figures: dict) -> Path:
    """Write machine, versions, command and figures to the file of results."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    path = results_path(name, device)
    content = {
        "command": " ".join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
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
