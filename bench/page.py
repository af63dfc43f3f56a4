"""How long the page of demo.py takes to answer a click, in a real browser; and the pictures of the README.

python -m bench.page --ckpt_path ckpt/ml-100k/lcrec --report results/ml-100k/lcrec/report.html --user 913
python -m bench.page --ckpt_path ckpt/ml-1m/collm-din --data_path ../shared/data

Other flags go to demo.py. Needs requirements-dev.txt and chromium; with --report the pictures go to pictures/.
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

from bench.common import last_figures, process_mb, write_results
from demo import URL_PREFIX
from reclingua.utils.errors import InputError, cli_main, one_line_errors

PICTURES = Path(__file__).parents[1] / "docs" / "images"
ANSWER = ".asked, .problem"
WINDOW = {"width": 1200, "height": 860}


@contextmanager
def served(*flags: object, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """demo.py in a process of its own: (its address, the process); InputError if it does not start.

    Raises:
        subprocess.TimeoutExpired: it did not end when it was told to, and was killed.
    """
    command = [sys.executable, "demo.py", *map(str, flags)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=PICTURES.parent, env=os.environ | environment
    ) as process:
        try:
            said = next((line for line in process.stdout if line.startswith(URL_PREFIX)), None)
            if said is None:
                raise InputError("demo.py did not start, as it says above")
            yield said.removeprefix(URL_PREFIX).split()[0], process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def answered_after(page, act: Callable[[], None]) -> float:
    """Seconds from `act`, which changes what is asked, until the answer is there and is another than before."""
    before = page.locator(ANSWER).inner_text() if page.locator(ANSWER).count() else ""
    began = time.perf_counter()
    act()
    page.wait_for_function(
        "([where, before]) => ![null, before].includes(document.querySelector(where)?.innerText ?? null)",
        arg=[ANSWER, before],
    )
    return time.perf_counter() - began


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="a folder written by finetune.py")
    parser.add_argument("--clicks", type=int, default=30, help="test users asked about (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="a report: take pictures of it and of the page")
    parser.add_argument("--user", help="who is on the picture (default: any test user)")
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
    with served("--ckpt_path", args.ckpt_path, *more) as (address, process), sync_playwright() as playwright:
        start = time.perf_counter() - began
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport=WINDOW)
        began = time.perf_counter()
        page.goto(address)
        page.locator(".items button").first.wait_for()
        load = time.perf_counter() - began
        anybody = page.get_by_role("button", name="A test")
        answered_after(page, anybody.click)  # the first one warms up
        clicks = [answered_after(page, anybody.click) for _ in range(args.clicks)]
        figures = {
            "start": round(start, 2),
            "load": round(load, 2),
            "click_median": round(statistics.median(clicks), 3),
            "click_longest": round(max(clicks), 3),
            "clicks": [round(click, 3) for click in clicks],
            "server_mb": round(process_mb("VmHWM", process.pid)),
        }
        if args.report:
            PICTURES.mkdir(exist_ok=True)
            if args.user:
                user = page.get_by_placeholder("a user's id")
                user.fill(args.user)
                answered_after(page, lambda: user.press("Enter"))
            page.wait_for_timeout(1000)  # until what was waited for has faded in
            page.screenshot(path=PICTURES / "page.png")
            page.set_viewport_size(WINDOW | {"height": 1300})
            page.goto(args.report.resolve().as_uri())
            page.screenshot(path=PICTURES / "report.png")
        browser.close()

    device = torch.device("cpu" if not torch.cuda.is_available() else "cuda")
    name = Path(args.ckpt_path).name
    print(
        f"{name}: {args.clicks} clicks, answered in {figures['click_median']} s, {figures['click_longest']} s at most"
    )
    print(f"demo.py starts in {start:.1f} s, the page in {load:.1f} s; {figures['server_mb']:,} MB at most")
    print(f"written to {write_results('page', device, last_figures('page', device) | {name: figures})}")


if __name__ == "__main__":
    main()
