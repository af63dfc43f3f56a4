"""Benchmark data.prepare on files of several sizes: seconds, peak memory and disk.

python -m bench.prepare --millions 1 5 10                     # makes the files, 170 MB gzipped for a million lines
python -m bench.prepare --millions 1 5 10 50 --work ~/big
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import json
import resource
import subprocess
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import duckdb
import numpy as np
import torch

from bench.common import RESULTS, process_mb, write_results
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, output_folder, read_json

CHUNK = 250_000  # lines of a gzip member
WINDOW = "--months 24 6 6 --liked_above 4 --min_interactions 5"
TASKS = {"sequential": [], "preference": WINDOW.split()}


def make_reviews(chunk: int, total: int) -> bytes:
    """Return a gzip member of reviews in the format of Amazon 2018: 3 a user and 17 an item on average, long-tailed.

    Texts have 300 bytes on average; every 200th line is a duplicate.
    """
    generator = np.random.default_rng(chunk)
    lines = min(CHUNK, total - chunk * CHUNK)
    vocabulary = make_words()
    texts = [
        " ".join(vocabulary[i] for i in generator.integers(0, len(vocabulary), generator.integers(30, 65)))
        for _ in range(500)
    ]
    columns = (
        (total / 3 * generator.random(lines) ** 2).astype(np.int64) * 2_654_435_761 % 2**48,
        (total / 17 * generator.random(lines) ** 3).astype(np.int64),
        generator.integers(1, 6, lines),
        generator.integers(1_400_000_000, 1_538_352_000, lines),  # 2014-05 to 2018-09
        generator.integers(0, len(texts), lines),
    )
    packed = zlib.compressobj(1, zlib.DEFLATED, 31)
    records = [
        f'{{"overall": {stars}.0, "verified": true, "reviewerID": "A{user:013X}", "asin": "B{item:09d}", "style": '
        f'{{"Format:": " Paperback"}}, "reviewText": "{texts[text]}", "summary": "Good", "unixReviewTime": {when}}}\n'
        for user, item, stars, when, text in zip(*(column.tolist() for column in columns), strict=True)
    ]
    records[1::200] = records[0::200][: len(records[1::200])]
    return packed.compress("".join(records).encode()) + packed.flush()


def make_words() -> list[str]:
    generator = np.random.default_rng(0)
    return ["".join(map(chr, generator.integers(97, 123, length))) for length in generator.integers(2, 10, 3000)]


def make_items(total: int) -> bytes:
    """Return a gzip member of the items of these reviews, one in 50 without a title."""
    packed = zlib.compressobj(1, zlib.DEFLATED, 31)
    description = " ".join(make_words()[:60])
    pieces = []
    for item in range(total // 17 + 1):
        title = "" if item % 50 == 49 else f"Book {item} &amp;amp; more"
        record = {
            "asin": f"B{item:09d}",
            "title": title,
            "description": [f"<p>{description}</p>", "<b>New</b>"],
            "brand": "x",
        }
        pieces.append(packed.compress((json.dumps(record) + "\n").encode()))
    return b"".join(pieces) + packed.flush()


def make_files(folder: Path, total: int) -> None:
    if (folder / "Books.json.gz").exists():
        return
    output_folder(folder)
    with atomic_write(folder / "meta_Books.json.gz") as temporary:
        temporary.write_bytes(make_items(total))
    with (
        ProcessPoolExecutor() as pool,
        atomic_write(folder / "Books.json.gz") as temporary,
        temporary.open("wb") as file,
    ):
        file.writelines(pool.map(make_reviews, range(-(-total // CHUNK)), repeat(total)))


def prepare(raw: Path, task: str, flags: list[str]) -> dict:
    """Run data.prepare in a process of its own; return seconds, peak memory and peak disk usage, MB."""
    output = raw / "out"
    source = ["--source", "amazon2018", "--dataset", "Books", "--raw_path", str(raw), "--data_path", str(output)]
    command = [sys.executable, "-m", "data.prepare", "--task", task, *source, *TASKS[task], *flags]
    output_folder(output)
    started, used, memory, disk = time.monotonic(), cpu_seconds(), 0.0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        memory = max(memory, process_mb("VmHWM", process.pid))
        disk = max(disk, disk_mb(output))
        time.sleep(0.1)
    seconds = time.monotonic() - started
    printed, error = process.communicate()
    if process.returncode:
        raise InputError(f"data.prepare failed: {error.strip().splitlines()[-1]}")
    return {
        "task": task,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds() - used, 1),
        "memory_mb": round(memory),
        "disk_mb": round(disk),
        "said": printed.splitlines(),
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of ended child processes, which other work on the machine changes less than seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def disk_mb(output: Path) -> float:
    """Return the size of the temporary files beside a dataset, MB."""
    total = 0
    for file in output.glob(".prepare-*/**/*"):
        with suppress(FileNotFoundError):  # already deleted
            total += file.stat().st_size
    return total / 2**20


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--millions", type=float, nargs="+", default=[1, 5, 10], help="lines of reviews (default: 1 5 10)"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="(default: both)")
    parser.add_argument(
        "--work", type=Path, default=Path("ckpt/bench-prepare"), help="folder for the files (default: %(default)s)"
    )
    parser.add_argument("--flags", default="", help="more flags for data.prepare")
    args = one_line_errors(parser).parse_args()
    last = RESULTS / "prepare.json"
    runs = read_json(last, "the last results")["runs"] if last.exists() else []  # results of other sizes are kept
    for millions in args.millions:
        raw, lines = args.work / f"{millions:g}M", int(millions * 1e6)
        make_files(raw, lines)
        gz_mb = round((raw / "Books.json.gz").stat().st_size / 2**20)
        for task in args.tasks:
            run = {"lines": lines, "gz_mb": gz_mb, **prepare(raw, task, args.flags.split())}
            runs = [earlier for earlier in runs if (earlier["lines"], earlier["task"]) != (lines, task)] + [run]
            print(f"{millions:g}M lines, {gz_mb:,} MB gzipped, {task}:")
            print(
                f"  {run['seconds']} s ({run['cpu_seconds']} CPU seconds), {run['memory_mb']:,} MB of memory,",
                end=" ",
            )
            print(f"{run['disk_mb']:,} MB of disk", *run["said"], sep="\n  ")
            path = write_results("prepare", torch.device("cpu"), {"duckdb": duckdb.__version__, "runs": runs})
            print(f"written to {path}", flush=True)


if __name__ == "__main__":
    main()
