"""Report pages in a browser, opened from disk: wide and on a phone, light and dark, by keyboard."""

import time
from io import BytesIO

import pytest
from PIL import Image

import report
from reclingua.reporting.details import report_folder
from tests.helpers.browser import page_errors, screenshot
from tests.helpers.reports import copy_run, edit_details
from tests.helpers.scripts import run_main
from tests.helpers.toys import TITLE

PHONE = {"width": 390, "height": 844}
DANGEROUS = "script, main b, img:not([src^='data:image/png'])"
BACKGROUND = {False: (255, 255, 255), True: (0, 0, 0)}
# [text colour, background colour] of each element, as "rgb(27, 27, 31)".
COLOURS = """elements => elements.map(element => {
    let opaque = element;
    while (getComputedStyle(opaque).backgroundColor === "rgba(0, 0, 0, 0)") opaque = opaque.parentElement;
    return [getComputedStyle(element).color, getComputedStyle(opaque).backgroundColor];
})"""


@pytest.fixture(scope="module", params=["next_item", "yes_no", "comparison"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def url(name, search_run, preference_runs):
    """Return the address of a page of each kind."""
    if name == "comparison":
        run_main(report.main, *preference_runs)
        return preference_runs[0].with_name("mf.compared.html").as_uri()
    file = search_run if name == "next_item" else preference_runs[0]
    return (report_folder(file) / "report.html").as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_tables_and_plots_are_visible(open_page, url, name, dark):
    page = open_page(url, dark=dark)
    screenshot(page, f"report-{name}-{'dark' if dark else 'light'}")
    assert page.locator("h1").count() == 1 and page.locator("section h2").count() >= 4
    tables = page.locator("section table").all()
    assert tables and all(table.locator("caption").inner_text() for table in tables)
    plots = page.locator("img").all()
    assert plots
    for plot in plots:
        assert plot.evaluate("image => image.complete && image.naturalWidth") > 0
        assert len(plot.get_attribute("alt")) > 30
        pixels = Image.open(BytesIO(plot.screenshot())).convert("RGB")
        assert pixels.getpixel((1, 1)) == BACKGROUND[dark]  # a plot has the background of the page
        assert len(pixels.getcolors(maxcolors=1_000_000)) > 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_enough_contrast(open_page, url, dark):
    page = open_page(url, dark=dark)
    page.locator("summary").click()
    for selector in ("body", "h1", "h2", ".summary", "caption", "thead th", "tbody th", "td", "summary", "details td"):
        colours = page.locator(selector).evaluate_all(COLOURS)
        assert colours, selector
        for text, background in colours:
            assert contrast(text, background) >= 4.5, (selector, text, background)
            assert parse_rgb(background) == BACKGROUND[dark]


def parse_rgb(colour):
    return tuple(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def contrast(one, other):
    """Return the contrast ratio (1 to 21) of the Web Content Accessibility Guidelines 2.2."""

    def luminance(colour):
        shares = [value / 255 for value in parse_rgb(colour)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_known_colours():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


def test_tables_scroll_on_a_phone_and_the_page_does_not(open_page, url, name):
    page = open_page(url, **PHONE)
    page.locator("summary").click()
    screenshot(page, f"report-{name}-phone")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    assert all(plot.bounding_box()["width"] <= PHONE["width"] for plot in page.locator("img").all())
    boxes = page.locator(".scrolls").all()
    wide = [box for box in boxes if box.evaluate("box => box.scrollWidth > box.clientWidth")]
    assert wide
    row = wide[0].locator("tbody th").first
    before = row.bounding_box()["x"]
    wide[0].evaluate("box => box.scrollLeft = 60")
    assert wide[0].evaluate("box => box.scrollLeft") > 0 and row.bounding_box()["x"] == before  # sticky


def test_keyboard_reaches_and_scrolls_each_table(open_page, url):
    page = open_page(url, **PHONE)
    for box in page.locator("section .scrolls").all():
        page.keyboard.press("Tab")
        assert box.evaluate("box => box === document.activeElement")
        assert box.get_attribute("aria-label") == box.locator("caption").inner_text()
        if box.evaluate("box => box.scrollWidth > box.clientWidth"):
            page.keyboard.press("ArrowRight")
            page.wait_for_function("document.activeElement.scrollLeft > 0")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    assert page.locator("details td").first.is_visible()


def test_settings_open_by_a_click(open_page, url):
    page = open_page(url)
    setting = page.locator("details td").first
    assert not setting.is_visible()
    page.locator("summary").click()
    assert setting.is_visible()


def test_html_in_texts_is_escaped(open_page, search_run, tmp_path):
    name = "<img src=x onerror=throw(1)>"
    edited = copy_run(search_run, tmp_path, f"{name}.json")
    edit_details(edited, prompts=[TITLE * 20] * 4)
    run_main(report.main, edited)
    page = open_page((report_folder(edited) / "report.html").as_uri())
    assert TITLE[:30] in page.locator("main").inner_text() and f"{name}.json" in page.locator("details").text_content()
    assert page.get_by_role("row", name="prompt 3").last.locator("td").inner_text() == f"{(TITLE * 20)[:399]}…"
    assert page.locator(DANGEROUS).count() == 0
    run_main(report.main, search_run, edited, "--output", tmp_path / "compared.html")
    page = open_page((tmp_path / "compared.html").as_uri())
    assert page.locator("h1").inner_text() == f"toy: lcrec, {name}" == page.title()
    assert page.locator(DANGEROUS).count() == 0


def test_page_errors_are_reported(browser, tmp_path):
    """`page_errors`, which open_page checks on every page, reports each kind of error, and none on a correct page."""
    expected_errors = {
        "<script>console.error('oh')</script>": "console: oh",
        "<script>throw new Error('ah')</script>": "error: ah",
        "<img src='http://192.0.2.1/a.png'>": "request: http://192.0.2.1/a.png",
        "<link rel=stylesheet href='https://example.com/a.css'>": "request: https://example.com/a.css",
        "<script>new WebSocket('ws://example.com/a')</script>": "request: ws://example.com/a",
        "<p>correct</p>": None,
    }
    for content, expected in expected_errors.items():
        (tmp_path / "page.html").write_text(f"<!DOCTYPE html>{content}")
        page = browser.new_page()
        errors = page_errors(page)
        page.goto((tmp_path / "page.html").as_uri())
        deadline = time.monotonic() + (20 if expected else 0.3)  # a socket connects after the page is loaded
        while expected not in errors and time.monotonic() < deadline:
            page.wait_for_timeout(20)
        page.close()
        assert expected in errors if expected else not errors
