"""Benchmark convert.merge_delta: speed next to a plain copy of the files that it reads, and peak memory.

python -m bench.convert                   # base, target and delta of 2 GB each, in a temporary folder
python -m bench.convert --gb 0.2 --work /dev/shm
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import filecmp
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import torch
from transformers import LlamaConfig

from bench.common import Peak, write_results
from convert import make_delta, merge_delta
from convert.folders import is_tied
from convert.shards import INDEX, Spec, Writer, plan_shards, read_weights
from reclingua.utils.errors import InputError, cli_main, one_line_errors

WIDTH, INNER, WORDS = 2048, 5632, 32_000  # TinyLlama's
SHARDS = 4
CHANGE = 0.02  # change of the weights by tuning, relative to their standard deviation
POOL_SIZE = 2**24  # random numbers of which the weights are slices


def write_model(folder: Path, size: int, tuned: bool) -> None:
    """Write a model of `size` bytes in bf16, in SHARDS files, with as many layers as that takes; or its tuned copy."""
    layer = {name: (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    layer |= {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER), "norm": (WIDTH,)}
    layer_bytes = sum(Spec(torch.bfloat16, shape).nbytes for shape in layer.values())
    layers = max(1, round((size - 4 * WORDS * WIDTH) / layer_bytes))
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()}
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (WORDS + 1024 * tuned, WIDTH)
    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    folder.mkdir()
    LlamaConfig(hidden_size=WIDTH, num_hidden_layers=layers, tie_word_embeddings=False).save_pretrained(folder)
    pool = 0.02 * torch.randn(2 * POOL_SIZE, generator=torch.Generator().manual_seed(0))
    with Writer(folder, plan_shards(specs, -(-sum(spec.nbytes for spec in specs.values()) // SHARDS))) as writer:
        for number, (name, spec) in enumerate(specs.items()):
            for start in range(0, spec.numel, POOL_SIZE):
                count = min(POOL_SIZE, spec.numel - start)
                weights = pool[number : number + count]
                change = CHANGE * pool[POOL_SIZE - number : POOL_SIZE - number + count]
                writer.put(name, weights.bfloat16() + change if tuned else weights, start)


def run(script, *argv: object) -> None:
    """Run a script of convert/ in this process, without its output."""
    before, sys.argv = sys.argv, ["convert", *map(str, argv)]
    with open(os.devnull, "w") as null, redirect_stdout(null):
        script.main()
    sys.argv = before


def warm_files(folders: list[Path]) -> None:
    """Read all files once and flush writes, so that no side waits for the disk."""
    for file in (file for folder in folders for file in folder.iterdir()):
        with file.open("rb") as content:
            while content.read(2**24):
                pass
    os.sync()


def merge(base: Path, delta: Path, output: Path) -> tuple[float, float, float]:
    """Merge in a process of its own; return seconds, CPU seconds and MB above the process with its libraries."""
    is_tied(delta)  # imports the libraries that reading a config needs
    warm_files([base, delta])
    with Peak(torch.device("cpu")) as peak:
        started, used = time.monotonic(), time.process_time()
        paths = ("--base-model-path", base, "--delta-path", delta, "--target-model-path", output)
        run(merge_delta, *paths)
        seconds, used = time.monotonic() - started, time.process_time() - used
    return seconds, used, peak.mb - peak.before


def copy(folders: list[Path], output: Path) -> tuple[float, float]:
    """Copy the files of each folder in turn; return seconds and CPU seconds."""
    seconds = used = 0.0
    for folder in folders:
        warm_files([folder])
        seconds, used = seconds - time.monotonic(), used - time.process_time()
        shutil.copytree(folder, output, copy_function=shutil.copyfile)
        seconds, used = seconds + time.monotonic(), used + time.process_time()
        shutil.rmtree(output)
    return seconds, used


def weight_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in read_weights(folder).values())


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2, help="size of the base model, GB (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for the files (default: the system's temporary folder)")
    args = one_line_errors(parser).parse_args()
    if args.gb <= 0 or args.repeats < 1:
        raise InputError("--gb should be above 0, --repeats 1 at least")
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = Path(work)
        base, target, delta, output = (work / name for name in ("base", "target", "delta", "output"))
        write_model(base, int(args.gb * 1e9), tuned=False)
        write_model(target, int(args.gb * 1e9), tuned=True)
        started = time.monotonic()
        paths = ("--base-model-path", base, "--target-model-path", target, "--delta-path", delta)
        run(make_delta, *paths)
        make_delta_seconds = time.monotonic() - started
        transferred = {
            "copy": 2 * (weight_bytes(base) + weight_bytes(delta)),
            "merge": weight_bytes(base) + 2 * weight_bytes(delta),
        }
        seconds: dict[str, list[float]] = {"copy": [], "merge": []}
        cpu_seconds: dict[str, list[float]] = {side: [] for side in seconds}
        peaks = []
        for number in range(args.repeats + 1):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                *timing, peak = pool.submit(merge, base, delta, output).result()
            rounds = {"merge": timing, "copy": copy([base, delta], work / "copies")}
            if number:  # the first round is the warm-up
                peaks.append(peak)
                for side in seconds:
                    seconds[side].append(round(rounds[side][0], 2))
                    cpu_seconds[side].append(round(rounds[side][1], 2))
            else:
                check_merged(target, output)
                shards = [file.stat().st_size for file in target.glob("*.safetensors")]
                shutil.rmtree(target)
            shutil.rmtree(output)
        corrections = sum(file.stat().st_size for file in delta.glob("corrections*"))

    medians = {side: statistics.median(times) for side, times in seconds.items()}
    speed = {side: transferred[side] / 1e9 / medians[side] for side in transferred}
    figures = {
        "ratio_vs_copy": round(speed["merge"] / speed["copy"], 2),
        "peak_over_largest_shard": round(max(peaks) * 2**20 / max(shards), 3),
        "gb_per_second": {side: round(rate, 2) for side, rate in speed.items()},
        "gb_read_and_written": {side: round(size / 1e9, 2) for side, size in transferred.items()},
        "seconds": seconds,
        "seconds_of_the_cores": cpu_seconds,
        "make_delta_seconds": round(make_delta_seconds, 1),
        "peak_mb": [round(peak, 1) for peak in peaks],
        "largest_shard_mb": round(max(shards) / 2**20, 1),
        "delta_mb": round(sum(shards) / 2**20),
        "corrections_mb": round(corrections / 2**20, 1),
    }
    print(f"{'':6}{'seconds':>9}{'CPU s':>9}{'GB/s':>7}")
    for side, median in medians.items():
        print(f"{side:6}{median:9.2f}{statistics.median(cpu_seconds[side]):9.2f}{speed[side]:7.2f}")
    print(f"merging is {figures['ratio_vs_copy']} times as fast as copying, a byte read and written")
    print(f"peak memory {max(peaks):.1f} MB, {figures['peak_over_largest_shard']} times the largest shard")
    print(f"written to {write_results('convert', torch.device('cpu'), figures)}")


def check_merged(target: Path, output: Path) -> None:
    """Raise InputError unless the weight files are the same byte by byte."""
    for file in sorted([*target.glob("*.safetensors"), target / INDEX]):
        if not filecmp.cmp(file, output / file.name, shallow=False):
            raise InputError(f"{output / file.name}: differs from {file}")


if __name__ == "__main__":
    main()
