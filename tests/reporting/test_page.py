"""The report as its reader has it: opened from disk in a browser, wide and on a phone, light and dark, by keyboard."""

import time
from io import BytesIO

import pytest
from PIL import Image

import report
from reclingua.reporting.details import folder_of
from tests.helpers.browser import faults, screenshot
from tests.helpers.reports import change, copy_of
from tests.helpers.scripts import run_main
from tests.helpers.toys import TITLE

PHONE = {"width": 390, "height": 844}
DANGEROUS = "script, main b, img:not([src^='data:image/png'])"
GROUND = {False: (255, 255, 255), True: (0, 0, 0)}
# [what a text is drawn in, what it stands on] of each element, as "rgb(27, 27, 31)".
COLOURS = """elements => elements.map(element => {
    let ground = element;
    while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
    return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
})"""


@pytest.fixture(scope="module", params=["search", "preference", "comparison"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def url(name, search_run, preference_runs):
    """A page of each kind."""
    if name == "comparison":
        run_main(report.main, *preference_runs)
        return preference_runs[0].with_name("mf.compared.html").as_uri()
    file = search_run if name == "search" else preference_runs[0]
    return (folder_of(file) / "report.html").as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_that_there_is_can_be_seen(open_page, url, name, dark):
    page = open_page(url, dark=dark)
    screenshot(page, f"report-{name}-{'dark' if dark else 'light'}")
    assert page.locator("h1").count() == 1 and page.locator("section h2").count() >= 4
    tables = page.locator("section table").all()
    assert tables and all(table.locator("caption").inner_text() for table in tables)
    pictures = page.locator("img").all()
    assert pictures
    for picture in pictures:
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
        assert len(picture.get_attribute("alt")) > 30
        shot = Image.open(BytesIO(picture.screenshot())).convert("RGB")
        assert shot.getpixel((1, 1)) == GROUND[dark]  # a picture stands on the ground of the page
        assert len(shot.getcolors(maxcolors=1_000_000)) > 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read(open_page, url, dark):
    page = open_page(url, dark=dark)
    page.locator("summary").click()
    for kind in ("body", "h1", "h2", ".summary", "caption", "thead th", "tbody th", "td", "summary", "details td"):
        found = page.locator(kind).evaluate_all(COLOURS)
        assert found, kind
        for text, ground in found:
            assert contrast(text, ground) >= 4.5, (kind, text, ground)
            assert numbers(ground) == GROUND[dark]


def numbers(colour):
    return tuple(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def contrast(one, other):
    """Between 1 and 21, as the Web Content Accessibility Guidelines 2.2 define it."""

    def luminance(colour):
        shares = [value / 255 for value in numbers(colour)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_colours_that_are_known():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


def test_on_a_phone_tables_scroll_and_the_page_does_not(open_page, url, name):
    page = open_page(url, **PHONE)
    page.locator("summary").click()
    screenshot(page, f"report-{name}-phone")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    assert all(picture.bounding_box()["width"] <= PHONE["width"] for picture in page.locator("img").all())
    boxes = page.locator(".scrolls").all()
    wide = [box for box in boxes if box.evaluate("box => box.scrollWidth > box.clientWidth")]
    assert wide
    row = wide[0].locator("tbody th").first
    before = row.bounding_box()["x"]
    wide[0].evaluate("box => box.scrollLeft = 60")
    assert wide[0].evaluate("box => box.scrollLeft") > 0 and row.bounding_box()["x"] == before  # names of rows stay


def test_the_keyboard_reaches_and_scrolls_each_table(open_page, url):
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


def test_how_it_was_made_opens_by_a_click(open_page, url):
    page = open_page(url)
    made = page.locator("details td").first
    assert not made.is_visible()
    page.locator("summary").click()
    assert made.is_visible()


def test_texts_that_look_like_html_are_shown_and_run_nothing(open_page, search_run, tmp_path):
    name = "<img src=x onerror=throw(1)>"
    odd = copy_of(search_run, tmp_path, f"{name}.json")
    change(odd, templates=[TITLE * 20] * 4)
    run_main(report.main, odd)
    page = open_page((folder_of(odd) / "report.html").as_uri())
    assert TITLE[:30] in page.locator("main").inner_text() and f"{name}.json" in page.locator("details").text_content()
    assert page.get_by_role("row", name="phrasing 3").last.locator("td").inner_text() == f"{(TITLE * 20)[:399]}…"
    assert page.locator(DANGEROUS).count() == 0
    run_main(report.main, search_run, odd, "--output", tmp_path / "compared.html")
    page = open_page((tmp_path / "compared.html").as_uri())
    assert page.locator("h1").inner_text() == f"toy: lcrec, {name}" == page.title()
    assert page.locator(DANGEROUS).count() == 0


def test_what_goes_wrong_on_a_page_is_found(browser, tmp_path):
    """What open_page does with every page can find something, and finds nothing where there is nothing."""
    wrong = {
        "<script>console.error('oh')</script>": "console: oh",
        "<script>throw new Error('ah')</script>": "error: ah",
        "<img src='http://192.0.2.1/a.png'>": "asked for http://192.0.2.1/a.png",
        "<link rel=stylesheet href='https://example.com/a.css'>": "asked for https://example.com/a.css",
        "<script>new WebSocket('ws://example.com/a')</script>": "asked for ws://example.com/a",
        "<p>all is well</p>": None,
    }
    for content, expected in wrong.items():
        (tmp_path / "page.html").write_text(f"<!DOCTYPE html>{content}")
        page = browser.new_page()
        found = faults(page)
        page.goto((tmp_path / "page.html").as_uri())
        ends = time.monotonic() + (20 if expected else 0.3)  # a page is loaded before its socket is connected
        while expected not in found and time.monotonic() < ends:
            page.wait_for_timeout(20)
        page.close()
        assert expected in found if expected else not found
