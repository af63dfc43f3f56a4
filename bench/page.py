"""Benchmark demo.py: seconds from a click to the answer in a browser; and the screenshots of the README.

python -m bench.page --ckpt_path ckpt/ml-100k/lcrec --report results/ml-100k/lcrec/report.html --user 913
python -m bench.page --ckpt_path ckpt/ml-1m/collm-din --data_path ~/datasets

Other flags are passed to demo.py. Needs requirements-dev.txt and chromium; --report writes to docs/images/.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.common import earlier_figures, process_mb, write_results
from demo import URL_PREFIX
from reclingua.utils.errors import InputError, cli_main, one_line_errors

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
ANSWER = ".asked, .problem"
WINDOW = {"width": 1200, "height": 860}


@contextmanager
def run_demo(*flags: object, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run demo.py in a process of its own and yield its address and the process.

    Raises:
        InputError: it does not start.
        subprocess.TimeoutExpired: it did not end on SIGTERM and was killed.
    """
    command = [sys.executable, "demo.py", *map(str, flags)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
    ) as process:
        try:
            line = next((line for line in process.stdout if line.startswith(URL_PREFIX)), None)
            if line is None:
                raise InputError("demo.py did not start, see above")
            yield line.removeprefix(URL_PREFIX).split()[0], process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def time_answer(page, act: Callable[[], None]) -> float:
    """Return the seconds from `act`, which changes the question, until a new answer is shown."""
    before = page.locator(ANSWER).inner_text() if page.locator(ANSWER).count() else ""
    began = time.perf_counter()
    act()
    page.wait_for_function(
        "([selector, before]) => ![null, before].includes(document.querySelector(selector)?.innerText ?? null)",
        arg=[ANSWER, before],
    )
    return time.perf_counter() - began


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="model folder written by finetune.py")
    parser.add_argument("--clicks", type=int, default=30, help="number of test users (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="take screenshots of this report and of the demo")
    parser.add_argument("--user", help="user on the screenshot (default: any test user)")
    args, more = one_line_errors(parser).parse_known_args()
    if args.clicks < 1:
        raise InputError(f"--clicks {args.clicks}: should be 1 at least")
    if args.report and not args.report.is_file():
        raise InputError(f"{args.report}: no such file; test.py writes it")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise InputError("playwright is missing: pip install -r requirements-dev.txt") from None
    if (chromium := shutil.which("chromium")) is None:
        raise InputError("chromium is missing: apt install chromium")

    began = time.perf_counter()
    with run_demo("--ckpt_path", args.ckpt_path, *more) as (address, process), sync_playwright() as playwright:
        start = time.perf_counter() - began
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport=WINDOW)
        began = time.perf_counter()
        page.goto(address)
        page.locator(".items button").first.wait_for()
        load = time.perf_counter() - began
        button = page.get_by_role("button", name="A test")
        time_answer(page, button.click)  # warm-up
        clicks = [time_answer(page, button.click) for _ in range(args.clicks)]
        figures = {
            "start": round(start, 2),
            "load": round(load, 2),
            "click_median": round(statistics.median(clicks), 3),
            "click_longest": round(max(clicks), 3),
            "clicks": [round(click, 3) for click in clicks],
            "server_mb": round(process_mb("VmHWM", process.pid)),
        }
        if args.report:
            IMAGES.mkdir(parents=True, exist_ok=True)
            if args.user:
                user = page.get_by_placeholder("a user's id")
                user.fill(args.user)
                time_answer(page, lambda: user.press("Enter"))
            page.wait_for_timeout(1000)  # until the answer has faded in
            page.screenshot(path=IMAGES / "page.png")
            page.set_viewport_size(WINDOW | {"height": 1300})
            page.goto(args.report.resolve().as_uri())
            page.screenshot(path=IMAGES / "report.png")
        browser.close()

    device = torch.device("cpu" if not torch.cuda.is_available() else "cuda")
    name = Path(args.ckpt_path).name
    print(
        f"{name}: {args.clicks} clicks, answered in {figures['click_median']} s, {figures['click_longest']} s at most"
    )
    print(f"demo.py starts in {start:.1f} s, the page in {load:.1f} s; {figures['server_mb']:,} MB at most")
    print(f"written to {write_results('page', device, earlier_figures('page', device) | {name: figures})}")


if __name__ == "__main__":
    main()
