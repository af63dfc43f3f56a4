"""Benchmark serve.py: requests in batches against one by one, overload, and reloads under load.

python -m bench.serve --ckpt_path ckpt/ml-100k/lcrec

Clients and server share one machine, over loopback. Other flags are passed to serve.py.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from bench.common import process_mb, write_results
from bench.recommend import generate_histories
from reclingua import Recommender
from reclingua.inference.loading import load_metadata
from reclingua.utils.access import ADMIN_KEY
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import read_json, write_json
from serve import URL_PREFIX

ROOT = Path(__file__).parents[1]
KEY = "key-of-the-benchmark"  # of reloads
WARM_UP = 2.0  # seconds of load before a measurement
OVERLOAD = 4  # times the requests a second of the closed loop
RELOAD_EVERY = 2.0  # seconds


@dataclass
class Load:
    """What clients saw.

    Args:
        seconds: status -> seconds of each request; status 0 stands for a connection that failed.
        titles: version of the catalogue -> first words of the titles in answers of that version.
        elapsed: seconds in which requests were sent.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    titles: dict[str, set[str]] = field(default_factory=dict)
    elapsed: float = 0.0

    def count(self, *statuses: int) -> int:
        return sum(len(self.seconds.get(status, ())) for status in statuses)

    def percentile(self, percent: float) -> float:
        """Return a percentile of the milliseconds of answers with status 200, 0 without any."""
        answered = self.seconds.get(200)
        return round(float(np.percentile(answered, percent)) * 1000, 1) if answered else 0.0

    def figures(self) -> dict[str, float]:
        """Return requests a second, percentiles in milliseconds, and the number of requests by status."""
        return {
            "requests_per_second": round(self.count(200) / self.elapsed, 1),
            "p50_ms": self.percentile(50),
            "p99_ms": self.percentile(99),
            **{f"status_{status}": len(times) for status, times in sorted(self.seconds.items())},
        }


class Client:
    """One keep-alive connection, which sends one request at a time."""

    def __init__(self, url: str, load: Load):
        self.address, self.load = urlsplit(url), load
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> None:
        """Send a request for a list, and note its answer."""
        began = time.perf_counter()
        try:
            status, answer = await self._exchange(body)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            status, answer = 0, b""
            self.close()
        self.load.seconds.setdefault(status, []).append(time.perf_counter() - began)
        if status == 200:
            content = json.loads(answer)
            words = {entry["title"].split()[0] for entry in content["items"]}
            self.load.titles.setdefault(content["catalogue"], set()).update(words)

    async def _exchange(self, body: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.address.hostname, self.address.port)
        reader, writer = self.streams
        head = f"POST /v1/recommend HTTP/1.1\r\nHost: {self.address.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        answer = await reader.readexactly(length)
        if "connection: close" in lines:
            self.close()
        return int(lines[0].split()[1]), answer

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


async def run_closed_loop(url: str, bodies: list[bytes], clients: int, seconds: float) -> Load:
    """Return what clients see of which each sends a request as soon as the one before is answered."""
    load = Load()
    ends = time.perf_counter() + seconds

    async def run(number: int) -> None:
        client = Client(url, load)
        for turn in range(10**9):
            if time.perf_counter() >= ends:
                break
            await client.ask(bodies[(number + turn * clients) % len(bodies)])
        client.close()

    began = time.perf_counter()
    await asyncio.gather(*(run(number) for number in range(clients)))
    load.elapsed = time.perf_counter() - began
    return load


async def run_open_loop(url: str, bodies: list[bytes], rate: float, seconds: float) -> Load:
    """Return what clients see that send `rate` requests a second, however slowly the server answers."""
    load = Load()
    idle: list[Client] = []
    tasks: set[asyncio.Task] = set()

    async def ask(body: bytes) -> None:
        client = idle.pop() if idle else Client(url, load)
        await client.ask(body)
        idle.append(client)

    began = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - began) < seconds:
        while sent < now * rate:
            task = asyncio.create_task(ask(bodies[sent % len(bodies)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.005)
    load.elapsed = time.perf_counter() - began
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return load


@contextmanager
def run_server(args: argparse.Namespace, more: list[str], *flags: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run serve.py at a free port; yield its address and the process. InputError if it does not start."""
    command = [sys.executable, "serve.py", "--ckpt_path", args.ckpt_path.resolve(), "--port", 0]
    command += ["--data_path", args.data_path.resolve(), "--timeout", args.timeout, *more, *flags]
    environment = os.environ | {ADMIN_KEY: KEY}
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        try:
            lines = process.stdout or []
            line = next((line for line in lines if line.startswith(URL_PREFIX)), None)
            if line is None:
                raise InputError("serve.py did not start, see above")
            yield line.removeprefix(URL_PREFIX).split()[0], process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def measure_closed_loop(args: argparse.Namespace, more: list[str], bodies: list[bytes], *flags: object) -> Load:
    """Return what the clients of a fresh server see."""
    with run_server(args, more, *flags) as (url, _):
        asyncio.run(run_closed_loop(url, bodies, args.clients, WARM_UP))
        return asyncio.run(run_closed_loop(url, bodies, args.clients, args.seconds))


def measure_overload(args: argparse.Namespace, more: list[str], bodies: list[bytes], rate: float) -> dict[str, float]:
    """Return what clients see that ask for more than the server can do, and its memory in each half of the time."""
    with run_server(args, more) as (url, process):
        asyncio.run(run_open_loop(url, bodies, rate, WARM_UP))
        loads, memory = [], []
        for _ in range(2):
            loads.append(asyncio.run(run_open_loop(url, bodies, rate, args.seconds / 2)))
            memory.append(round(process_mb("VmRSS", process.pid), 1))
        asyncio.run(run_closed_loop(url, bodies, 1, 0.1))  # it still answers
        both = Load(elapsed=sum(load.elapsed for load in loads))
        for status in {status for load in loads for status in load.seconds}:
            both.seconds[status] = [value for load in loads for value in load.seconds.get(status, ())]
        sent = both.count(*both.seconds) / both.elapsed
        return both.figures() | {"sent_per_second": round(sent, 1), "mb_halfway": memory[0], "mb_end": memory[1]}


def measure_reload(args: argparse.Namespace, more: list[str], bodies: list[bytes]) -> dict[str, float]:
    """Return what the clients of a server see whose items get other titles every RELOAD_EVERY seconds."""
    name = load_metadata(args.ckpt_path).dataset

    def reload(url: str, items: Path, number: int) -> None:
        texts = read_json(items, "item -> texts")
        write_json(items, {item: {"title": f"catalogue-{number} {item}"} for item in texts})
        request = urllib.request.Request(f"{url}/v1/admin/reload", b"", {"Authorization": f"Bearer {KEY}"})
        urllib.request.urlopen(request, timeout=600).close()

    async def run(url: str, items: Path) -> tuple[Load, int]:
        await asyncio.to_thread(reload, url, items, 0)  # from here on all titles begin with their catalogue
        loading = asyncio.create_task(run_closed_loop(url, bodies, args.clients, args.seconds))
        reloads = 0
        while not loading.done():
            await asyncio.wait([loading], timeout=RELOAD_EVERY)
            reloads += 1
            await asyncio.to_thread(reload, url, items, reloads)
        return await loading, reloads

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(args.data_path / name, Path(folder) / name)
        with run_server(args, more, "--data_path", folder) as (url, _):
            load, reloads = asyncio.run(run(url, Path(folder) / name / f"{name}.item.json"))
    mixed = sum(len(words) > 1 for words in load.titles.values())
    return load.figures() | {"reloads": reloads, "catalogues": len(load.titles), "mixed_catalogues": mixed}


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="next-item model written by finetune.py")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="length of a measurement (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="of the closed loop (default: %(default)s)")
    parser.add_argument("--k", type=int, default=10, help="length of a list (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=10, help="deadline, seconds (default: %(default)s)")
    args, more = one_line_errors(parser).parse_known_args()
    if args.seconds <= 0 or args.clients < 1:
        raise InputError(f"--seconds {args.seconds:g}, --clients {args.clients}: should be more than 0")

    items = list(Recommender.from_pretrained(args.ckpt_path, args.data_path).dataset.index)
    histories = generate_histories(items, 2000, 0)
    bodies = [json.dumps({"history": history, "k": args.k, "exclude_seen": True}).encode() for history in histories]

    single = measure_closed_loop(args, more, bodies, "--max_batch", 1)
    print(f"one by one: {single.figures()}", flush=True)
    batched = measure_closed_loop(args, more, bodies)
    print(f"in batches: {batched.figures()}", flush=True)
    rate = OVERLOAD * batched.count(200) / batched.elapsed
    overload = measure_overload(args, more, bodies, rate)
    print(f"overload: {overload}", flush=True)
    reload = measure_reload(args, more, bodies)
    print(f"reloads: {reload}", flush=True)

    figures = {
        "ratio_vs_single": round(batched.count(200) / batched.elapsed / (single.count(200) / single.elapsed), 2),
        "p99_ms": batched.percentile(99),
        "errors": batched.count(*batched.seconds) - batched.count(200),
        "overload_p99_ms": overload["p99_ms"],
        "single": single.figures(),
        "batched": batched.figures(),
        "overload": overload,
        "reload": reload,
        "clients": args.clients,
        "seconds": args.seconds,
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"results in {write_results('serve', device, figures)}")


if __name__ == "__main__":
    main()
