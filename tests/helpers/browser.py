"""Pages in a real browser: Debian's chromium, driven by Playwright, which may ask for nothing outside this machine."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
# Playwright itself switches off what a browser asks for of its own accord, and the sandbox, which root cannot have.
# No name but localhost is looked up, so that a page that asks the network gets nothing.
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
FLAGS = ["--disable-gpu", "--disable-quic", NO_NAMES]
INSIDE = {"file", "data", "blob", "about"}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A Playwright Browser for one file of tests: as long as Playwright runs, asyncio.run does not in its thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: requirements-dev.txt")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is missing (on Debian: apt install chromium)")
    with playwright.sync_playwright() as running:
        try:
            started = running.chromium.launch(executable_path=chromium, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"{chromium} does not start: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """open_page(url, dark=False, width=1200, height=900): a Playwright Page, loaded; `faults` of it fail the test."""
    contexts, found = [], []

    def load(url: str, dark: bool = False, width: int = 1200, height: int = 900):
        context = browser.new_context(
            color_scheme="dark" if dark else "light", viewport={"width": width, "height": height}
        )
        contexts.append(context)
        page = context.new_page()
        found.append(faults(page))
        page.goto(url)
        return page

    yield load
    for context in contexts:
        context.close()
    wrong = sum(found, [])
    assert not wrong, wrong


def faults(page) -> list[str]:
    """What goes wrong on a page, as it happens: errors, and all that it asks for outside this machine."""
    found = []
    page.on("console", lambda message: message.type == "error" and found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("request", lambda request: is_outside(request.url) and found.append(f"asked for {request.url}"))
    page.on("websocket", lambda socket: is_outside(socket.url) and found.append(f"asked for {socket.url}"))
    return found


def is_outside(url: str) -> bool:
    """Whether it is neither a file, nor inside the page, nor on this machine."""
    parts = urlsplit(url)
    return parts.scheme not in INSIDE and parts.hostname not in ("127.0.0.1", "localhost", "::1")


def screenshot(page, name: str) -> None:
    """Keep the whole page as tests/artifacts/<name>.png."""
    page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=True)
