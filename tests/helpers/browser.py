"""Browser fixtures: Debian's chromium, driven by Playwright; requests outside this machine fail the test."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
# Playwright itself disables the browser's background requests, and the sandbox, which does not run as root.
# Only localhost is resolved, so that a page cannot reach the network.
NO_DNS = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
FLAGS = ["--disable-gpu", "--disable-quic", NO_DNS]
LOCAL_SCHEMES = {"file", "data", "blob", "about"}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Start a Playwright Browser for one test file; asyncio.run fails in this thread as long as it runs."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: requirements-dev.txt")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is missing (on Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        try:
            instance = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"{chromium} does not start: {str(error).splitlines()[0]}")
        yield instance
        instance.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Return open_page(url, dark=False, width=1200, height=900) -> a loaded Page, whose errors fail the test."""
    contexts, errors_by_page = [], []

    def load(url: str, dark: bool = False, width: int = 1200, height: int = 900):
        context = browser.new_context(
            color_scheme="dark" if dark else "light", viewport={"width": width, "height": height}
        )
        contexts.append(context)
        page = context.new_page()
        errors_by_page.append(page_errors(page))
        page.goto(url)
        return page

    yield load
    for context in contexts:
        context.close()
    errors = sum(errors_by_page, [])
    assert not errors, errors


def page_errors(page) -> list[str]:
    """Return a list that collects the errors of a page from now on, and its requests outside this machine."""
    errors: list[str] = []
    page.on("console", lambda message: message.type == "error" and errors.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: errors.append(f"error: {error}"))
    page.on("request", lambda request: is_outside(request.url) and errors.append(f"request: {request.url}"))
    page.on("websocket", lambda socket: is_outside(socket.url) and errors.append(f"request: {socket.url}"))
    return errors


def is_outside(url: str) -> bool:
    """Return whether the URL is neither a file, nor inline data, nor on this machine."""
    parts = urlsplit(url)
    return parts.scheme not in LOCAL_SCHEMES and parts.hostname not in ("127.0.0.1", "localhost", "::1")


def screenshot(page, name: str) -> None:
    """Save the whole page as tests/artifacts/<name>.png."""
    page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=True)
