"""demo.py in a browser: search titles, click a history together, read the answers of the models."""

import json
import re
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import finetune
from bench.page import ANSWER, run_demo, time_answer
from tests.helpers.browser import screenshot
from tests.helpers.scripts import run_main, second
from tests.helpers.toys import TITLE


@pytest.fixture(scope="module")
def data(workshop, studio, tmp_path_factory):
    """Link both toy datasets into one folder, with HTML and template syntax in the titles."""
    root = tmp_path_factory.mktemp("both")
    for folder in (workshop / "datasets" / "toy", studio / "liked"):
        (root / folder.name).mkdir()
        for file in folder.iterdir():
            (root / folder.name / file.name).symlink_to(file)
    for file, count in ((root / "toy" / "toy.item.json", 9), (root / "liked" / "item.json", 31)):
        texts = {str(i): {"title": f"Thing {i} {TITLE} ${{alert(1)}} {{{{x}}}} `"} for i in range(count)}
        if count == 31:
            del texts["0"]  # item ids of ratings start at 1
        texts["8"]["title"] = "Endless " * 40
        file.unlink()
        file.write_text(json.dumps(texts))
    return root


HOSTILE = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True", "GRADIO_DEBUG": "1"}
HOSTILE |= {"HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "example.com"}


@pytest.fixture(scope="module")
def address(browser, workshop, tuned, studio, data):
    """Serve the page of a next-item and a Yes/No model, until SIGTERM; `browser` first: without it all is skipped."""
    steps = ("--max_steps", 10, "--save_strategy", "no", "--learning_rate", 0.01, "--data_path", data)
    run_main(finetune.main, *second(studio, "collm", studio / "collm", *steps))
    with run_demo("--ckpt_path", tuned, studio / "collm", "--data_path", data, "--num_beams", 8, **HOSTILE) as served:
        address, process = served
        yield address
        end(process, open_until_ready(browser, address), signal.SIGTERM)


@pytest.fixture
def page(open_page, address):
    page = open_page(address)
    page.locator(".items button").first.wait_for()
    return page


def answer_after(page, act):
    """Return the text of the answer that `act` leads to."""
    time_answer(page, act)
    return page.locator(ANSWER).inner_text()


def load_user(page, user):
    """Load a test user by the id box."""
    box = page.get_by_placeholder("a user's id").locator("visible=true")
    box.fill(str(user))
    box.press("Enter")


def test_clicked_history_gets_recommendations(page):
    page.get_by_label("Search titles").fill("thing 3")
    page.get_by_role("button", name="Thing 3").wait_for()
    page.wait_for_function("document.querySelectorAll('.items li').length == 1")
    table = answer_after(page, page.get_by_role("button", name="Thing 3").click)
    assert "lcrec: top 8 by log-probability" in table and "<a_1><b_1>" in table
    assert page.locator(".chips button").count() == 1 and "1 item" in page.locator(".chips + p").inner_text()
    assert "Thing 4" in page.locator(".ranking tbody tr").first.inner_text()  # users walk around a ring
    assert page.locator(".taken").count() == 0
    screenshot(page, "demo-next-item")
    page.locator(".chips button").click()
    page.wait_for_function("!document.querySelector('.ranking')")


def test_test_user_baselines_and_actual_next_item(page):
    table = answer_after(page, lambda: load_user(page, 5))
    assert page.locator(".taken").count() == 1 and "actual next item" in page.locator(".taken").inner_text()
    assert "at rank 1" in page.locator(".verdict").inner_text()
    seen = set(re.findall(r"Thing \d", page.locator(".chips").inner_text()))
    assert not seen & set(re.findall(r"Thing \d", table))
    for name in ("popularity", "co-occurrence"):
        other = answer_after(page, page.get_by_label(name).click)
        assert other.startswith(f"{name}: top") and other != table
    with_seen = answer_after(page, page.get_by_label("Exclude items").click)
    assert seen & set(re.findall(r"Thing \d", with_seen))
    assert "Test user 5. " in page.locator(".part .faint").first.inner_text()
    target = re.search(r"Thing \d", page.locator(".verdict").inner_text())[0]
    answer_after(page, page.get_by_label("Exclude items").click)
    answer_after(page, page.locator(".items").get_by_text(target).click)
    assert "excluded because it is in the history" in page.locator(".verdict").inner_text()
    assert "Test user 5, history changed. " in page.locator(".part .faint").first.inner_text()


def test_html_in_titles_is_escaped_and_long_input_is_cut(page):
    answer_after(page, lambda: load_user(page, 5))
    assert '<b>"bold"</b>' in page.locator(".items").first.inner_text()
    assert "${alert(1)} {{x}} `" in page.locator(".ranking").inner_text()
    assert page.locator(".part b, .part script, .part img").count() == 0
    search = page.get_by_label("Search titles")
    search.fill("endless")
    page.get_by_role("button", name="Endless").wait_for()
    assert len(page.locator(".items button").first.inner_text()) < 200
    search.evaluate("box => box.removeAttribute('maxlength')")
    search.fill("<b>x</b> " * 1_200)
    page.get_by_text("No title contains these words").wait_for()
    load_user(page, "<img src=x>" + "9" * 90)
    page.get_by_text("there is no test user").wait_for()
    assert page.locator("[data-testid=toast-text] img, .toast-text img").count() == 0


def test_yes_no_with_and_without_the_collaborative_model(page):
    page.get_by_role("tab", name="collm").click()
    answers = answer_after(page, lambda: load_user(page, 7))
    assert len(re.findall(r"Yes: \d+\.\d %", answers)) == 2
    assert re.search("Actual rating: the user (liked|did not like) it", page.locator(".verdict").inner_text())
    visible = page.locator("button[data-role=ask]").locator("visible=true")
    answer_after(page, visible.nth(1).click)
    assert page.locator(".verdict").count() == 0
    screenshot(page, "demo-yes-or-no")
    page.get_by_role("button", name="Clear").locator("visible=true").click()
    page.wait_for_function("!document.querySelector('.answers')")
    answers = answer_after(page, visible.first.click)
    assert len(re.findall("Yes:", answers)) == 1 and "take a test user" in answers


def test_page_does_not_scroll_sideways_on_a_phone(open_page, address):
    page = open_page(address, dark=True, width=390, height=800)
    page.locator(".items button").first.wait_for()
    answer_after(page, lambda: load_user(page, 5))
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    screenshot(page, "demo-phone")


def test_concurrent_visitors_are_all_answered(open_page, address):
    pages = [open_page(address) for _ in range(4)]
    for page in pages:
        page.locator(".items button").first.wait_for()
    for user, page in enumerate(pages):
        load_user(page, user)
    tables = []
    for page in pages:
        page.locator(".ranking").wait_for()
        tables.append(page.locator(".ranking").inner_text())
    assert all(": top" in table for table in tables) and len(set(tables)) > 1


def test_quick_clicks_are_all_processed(page):
    page.evaluate("document.querySelectorAll('.items button').forEach(button => button.click())")
    page.wait_for_function("document.querySelectorAll('.chips button').length == 6")


def open_until_ready(browser, address):
    """Open the demo page; its errors, such as those of a server that ends, fail no test."""
    page = browser.new_page()
    page.goto(address)
    page.locator(".items button").first.wait_for()
    return page


def end(process, page, number):
    """End the server by a signal while a page is open."""
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    page.close()


def test_timeout_is_shown_and_sigint_ends_the_server(browser, heeded, tuned, data):
    with run_demo("--ckpt_path", tuned, "--data_path", data, "--timeout", 0.0001) as (address, process):
        page = open_until_ready(browser, address)
        assert "no answer within 0.0001 seconds" in answer_after(page, lambda: load_user(page, 5))
        end(process, page, signal.SIGINT)


def test_environment_cannot_expose_the_server_or_files(address):
    """The server listens on 127.0.0.1 alone and serves no file of this machine."""
    port = int(address.rsplit(":", 1)[1])
    sockets = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert [socket for socket in sockets if socket.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    for path in ("gradio_api/file=demo.py", "gradio_api/file=/etc/hostname", "monitoring", "gradio_api/runs"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/{path}", timeout=10)
