"""convert.merge_delta beside a plain copy of the files that it reads: speed, and the most memory it takes.

python -m bench.convert                   # makes 2 GB of base, and as much of target and delta, in a temporary folder
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
from convert.shards import INDEX, Spec, Writer, plan, read_weights
from reclingua.utils.errors import InputError, cli_main, one_line_errors

WIDTH, INNER, WORDS = 2048, 5632, 32_000  # TinyLlama's
SHARDS = 4
MOVED = 0.02  # by how much of their spread tuning has changed the weights
DRAWN = 2**24  # random numbers, of which stretches make the weights


def write_model(folder: Path, size: int, tuned: bool) -> None:
    """A model of `size` bytes in bf16, of as many layers as that takes, in SHARDS files; or that model tuned."""
    layer = {name: (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    layer |= {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER), "norm": (WIDTH,)}
    of_layer = sum(Spec(torch.bfloat16, shape).nbytes for shape in layer.values())
    layers = max(1, round((size - 4 * WORDS * WIDTH) / of_layer))
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()}
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (WORDS + 1024 * tuned, WIDTH)
    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    folder.mkdir()
    LlamaConfig(hidden_size=WIDTH, num_hidden_layers=layers, tie_word_embeddings=False).save_pretrained(folder)
    drawn = 0.02 * torch.randn(2 * DRAWN, generator=torch.Generator().manual_seed(0))
    with Writer(folder, plan(specs, -(-sum(spec.nbytes for spec in specs.values()) // SHARDS))) as writer:
        for number, (name, spec) in enumerate(specs.items()):
            for start in range(0, spec.numel, DRAWN):
                count = min(DRAWN, spec.numel - start)
                weights = drawn[number : number + count]
                moved = MOVED * drawn[DRAWN - number : DRAWN - number + count]
                writer.put(name, weights.bfloat16() + moved if tuned else weights, start)


def run(script, *argv: str) -> None:
    before, sys.argv = sys.argv, ["convert", *map(str, argv)]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        script.main()
    sys.argv = before


def settle(folders: list[Path]) -> None:
    """Read all files once, so that no side waits for the disk to read, and let it write what is to be written."""
    for file in (file for folder in folders for file in folder.iterdir()):
        with file.open("rb") as content:
            while content.read(2**24):
                pass
    os.sync()


def merge(base: Path, delta: Path, output: Path) -> tuple[float, float, float]:
    """Seconds, those of the cores, and MB above what a process with its libraries has; for a process of its own."""
    is_tied(delta)  # imports what reading a config needs
    settle([base, delta])
    with Peak(torch.device("cpu")) as peak:
        started, used = time.monotonic(), time.process_time()
        where = ("--base-model-path", base, "--delta-path", delta, "--target-model-path", output)
        run(merge_delta, *where)
        seconds, used = time.monotonic() - started, time.process_time() - used
    return seconds, used, peak.mb - peak.before


def copy(folders: list[Path], output: Path) -> tuple[float, float]:
    """Seconds, and those of the cores, that copying their files takes, one folder after another."""
    seconds = used = 0.0
    for folder in folders:
        settle([folder])
        seconds, used = seconds - time.monotonic(), used - time.process_time()
        shutil.copytree(folder, output, copy_function=shutil.copyfile)
        seconds, used = seconds + time.monotonic(), used + time.process_time()
        shutil.rmtree(output)
    return seconds, used


def held(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in read_weights(folder).values())


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2, help="size of the base model, GB (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="where the files go (default: the system's temporary folder)")
    args = one_line_errors(parser).parse_args()
    if args.gb <= 0 or args.repeats < 1:
        raise InputError("--gb should be above 0, --repeats 1 at least")
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = Path(work)
        base, target, delta, output = (work / name for name in ("base", "target", "delta", "output"))
        write_model(base, int(args.gb * 1e9), tuned=False)
        write_model(target, int(args.gb * 1e9), tuned=True)
        started = time.monotonic()
        where = ("--base-model-path", base, "--target-model-path", target, "--delta-path", delta)
        run(make_delta, *where)
        made = time.monotonic() - started
        moved = {"copy": 2 * (held(base) + held(delta)), "merge": held(base) + 2 * held(delta)}
        seconds: dict[str, list[float]] = {"copy": [], "merge": []}
        of_cores: dict[str, list[float]] = {side: [] for side in seconds}
        peaks = []
        for number in range(args.repeats + 1):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                *took, peak = pool.submit(merge, base, delta, output).result()
            rounds = {"merge": took, "copy": copy([base, delta], work / "copies")}
            if number:  # the first is to warm up
                peaks.append(peak)
                for side in seconds:
                    seconds[side].append(round(rounds[side][0], 2))
                    of_cores[side].append(round(rounds[side][1], 2))
            else:
                check(target, output)
                shards = [file.stat().st_size for file in target.glob("*.safetensors")]
                shutil.rmtree(target)
            shutil.rmtree(output)
        corrections = sum(file.stat().st_size for file in delta.glob("corrections*"))

    middle = {side: statistics.median(of) for side, of in seconds.items()}
    speed = {side: moved[side] / 1e9 / middle[side] for side in moved}
    figures = {
        "ratio_vs_copy": round(speed["merge"] / speed["copy"], 2),
        "peak_over_largest_shard": round(max(peaks) * 2**20 / max(shards), 3),
        "gb_per_second": {side: round(of, 2) for side, of in speed.items()},
        "gb_read_and_written": {side: round(of / 1e9, 2) for side, of in moved.items()},
        "seconds": seconds,
        "seconds_of_the_cores": of_cores,
        "make_delta_seconds": round(made, 1),
        "peak_mb": [round(peak, 1) for peak in peaks],
        "largest_shard_mb": round(max(shards) / 2**20, 1),
        "delta_mb": round(sum(shards) / 2**20),
        "corrections_mb": round(corrections / 2**20, 1),
    }
    print(f"{'':6}{'seconds':>9}{'of cores':>9}{'GB/s':>7}")
    for side, of in middle.items():
        print(f"{side:6}{of:9.2f}{statistics.median(of_cores[side]):9.2f}{speed[side]:7.2f}")
    print(f"merging is {figures['ratio_vs_copy']} times as fast as copying, a byte read and written")
    print(f"peak memory {max(peaks):.1f} MB, {figures['peak_over_largest_shard']} times the largest shard")
    print(f"written to {write_results('convert', torch.device('cpu'), figures)}")


def check(target: Path, output: Path) -> None:
    """InputError unless the files of weights are the same, byte by byte."""
    for file in sorted([*target.glob("*.safetensors"), target / INDEX]):
        if not filecmp.cmp(file, output / file.name, shallow=False):
            raise InputError(f"{output / file.name}: is not what was to be merged, {file}")


if __name__ == "__main__":
    main()
