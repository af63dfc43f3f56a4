"""Benchmark recommend.py: users a second and memory, for generated users, by one process and by two.

python -m bench.recommend --ckpt_path ckpt/ml-100k/lcrec --users 10000,100000
"""

from reclingua.utils.logging import silence_third_party

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.common import write_results
from reclingua import Recommender
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.processes import claim_device

ROOT = Path(__file__).parents[1]
LENGTHS = (1, 60)  # items of a generated history
ROWS = 10_000  # users in memory at a time


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="model folder written by finetune.py")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--users", default="10000,100000", help="numbers of users (default: %(default)s)")
    parser.add_argument("--processes", default="1,2", help="numbers of processes (default: %(default)s)")
    parser.add_argument(
        "--search_users", type=int, default=5000, help="users of the search alone (default: %(default)s)"
    )
    parser.add_argument("--k", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="(default: %(default)s)")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    silence_third_party()
    device = torch.device(claim_device())
    figures, search = {}, measure_search(args)
    with tempfile.TemporaryDirectory() as folder:
        for users in map(int, args.users.split(",")):
            histories = write_histories(args, Path(folder) / f"{users}.parquet", users)
            for processes in map(int, args.processes.split(",")):
                before, run = search, measure_command(args, histories, processes)
                search = measure_search(args)  # before and after the command, since the speed of a machine changes
                run["search_users_per_second"] = round((before + search) / 2, 1)
                run["relative_to_search"] = round(run["users_per_second"] / run["search_users_per_second"], 3)
                figures[f"{users}_users_{processes}_processes"] = run
                shown = ", ".join(f"{value} {name}" for name, value in run.items())
                print(f"{users:,} users, {processes} processes: {shown}", flush=True)
    print(f"results in {write_results('recommend', device, figures)}")


def generate_histories(items: list[str], users: int, seed: int) -> list[list[str]]:
    """Return random histories of LENGTHS different items."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(*LENGTHS, users, endpoint=True).clip(max=len(items))
    return [[items[number] for number in draw.choice(len(items), length, replace=False)] for length in lengths]


def write_histories(args: argparse.Namespace, path: Path, users: int) -> Path:
    """Write a parquet file of generated histories, some users at a time."""
    recommender = Recommender.from_pretrained(args.ckpt_path, args.data_path)
    items = list(recommender.dataset.index)
    schema = pa.schema({"user": pa.string(), "items": pa.list_(pa.string())})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, users, ROWS):
            count = min(ROWS, users - start)
            names = [f"u{number}" for number in range(start, start + count)]
            rows = {"user": names, "items": generate_histories(items, count, start)}
            writer.write_table(pa.table(rows, schema=schema))
    return path


def measure_search(args: argparse.Namespace) -> float:
    """Return the users a second of `Recommender.recommend` alone."""
    recommender = Recommender.from_pretrained(args.ckpt_path, args.data_path)
    histories = generate_histories(list(recommender.dataset.index), args.search_users, 0)
    recommender.recommend(histories[: args.batch_size], args.k, batch_size=args.batch_size)  # warm-up
    began = time.perf_counter()
    recommender.recommend(histories, args.k, batch_size=args.batch_size)
    return len(histories) / (time.perf_counter() - began)


def measure_command(args: argparse.Namespace, histories: Path, processes: int) -> dict[str, float]:
    """Return the speed and the memory of recommend.py, the latter of its largest process.

    Raises:
        InputError: it fails.
    """
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), "recommend.py", "--histories", histories]
    command += ["--ckpt_path", args.ckpt_path.resolve(), "--data_path", args.data_path.resolve(), "--k", args.k]
    command += ["--batch_size", args.batch_size, "--output", histories.with_name("lists.parquet")]
    began = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)  # of this run alone, its own processes included
        process.returncode = os.waitstatus_to_exitcode(status)
    rate = re.search(r"\(([\d.]+) a second\)", printed)
    if process.returncode or rate is None:
        raise InputError("recommend.py failed, see above")
    return {
        "users_per_second": float(rate[1]),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mb": round(usage.ru_maxrss / 2**10, 1),
    }


if __name__ == "__main__":
    main()
