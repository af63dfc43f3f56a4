"""demo.py in a real browser: titles are searched and clicked, and what the models make of that appears."""

import json
import re
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import finetune
from bench.page import ANSWER, answered_after, served
from tests.helpers.browser import screenshot
from tests.helpers.scripts import run_main, second
from tests.helpers.toys import TITLE


@pytest.fixture(scope="module")
def data(workshop, studio, tmp_path_factory):
    """Both toys in one folder, titles full of HTML and of what templates run."""
    root = tmp_path_factory.mktemp("both")
    for folder in (workshop / "datasets" / "toy", studio / "liked"):
        (root / folder.name).mkdir()
        for file in folder.iterdir():
            (root / folder.name / file.name).symlink_to(file)
    for file, count in ((root / "toy" / "toy.item.json", 9), (root / "liked" / "item.json", 31)):
        texts = {str(i): {"title": f"Thing {i} {TITLE} ${{alert(1)}} {{{{x}}}} `"} for i in range(count)}
        texts = {item: text for item, text in texts.items() if count == 9 or item != "0"}  # ids of ratings begin at 1
        texts["8"]["title"] = "Endless " * 3_000
        file.unlink()
        file.write_text(json.dumps(texts))
    return root


@pytest.fixture(scope="module")
def address(browser, workshop, tuned, studio, data):
    """The page of a model that searches and of one that answers Yes or No; not before there is a browser."""
    steps = ("--max_steps", 10, "--save_strategy", "no", "--learning_rate", 0.01)
    run_main(finetune.main, *second(studio, "collm", studio / "collm", *steps))
    with served("--ckpt_path", tuned, studio / "collm", "--data_path", data, "--num_beams", 8) as (address, _):
        yield address


@pytest.fixture
def page(open_page, address):
    page = open_page(address)
    page.locator(".items button").first.wait_for()
    return page


def after(page, act):
    """The answer that `act` brings about."""
    answered_after(page, act)
    return page.locator(ANSWER).inner_text()


def by_id(page, user):
    box = page.get_by_placeholder("a user's id").locator("visible=true")
    box.fill(str(user))
    box.press("Enter")


def test_a_history_of_clicks_gets_recommendations(page):
    page.get_by_label("Search titles").fill("thing 3")
    page.get_by_role("button", name="Thing 3").wait_for()
    page.wait_for_function("document.querySelectorAll('.items li').length == 1")
    table = after(page, page.get_by_role("button", name="Thing 3").click)
    assert "lcrec: the first 8 by log-probability" in table and "<a_1><b_1>" in table
    assert page.locator(".chips button").count() == 1 and "1 item" in page.locator(".chips + p").inner_text()
    assert "Thing 4" in page.locator(".ranking tbody tr").first.inner_text()  # users walk around a ring
    assert page.locator(".taken").count() == 0
    screenshot(page, "demo-next-item")
    page.locator(".chips button").click()
    page.wait_for_function("!document.querySelector('.ranking')")


def test_a_test_user_the_baselines_and_what_was_really_taken(page):
    table = after(page, lambda: by_id(page, 5))
    assert page.locator(".taken").count() == 1 and "really taken" in page.locator(".taken").inner_text()
    assert "at place 1" in page.locator(".verdict").inner_text()
    seen = set(re.findall(r"Thing \d", page.locator(".chips").inner_text()))
    assert not seen & set(re.findall(r"Thing \d", table))
    for who in ("popularity", "co-occurrence"):
        other = after(page, page.get_by_label(who).click)
        assert other.startswith(f"{who}: the first") and other != table
    again = after(page, page.get_by_label("Leave out").click)
    assert seen & set(re.findall(r"Thing \d", again))
    assert "Test user 5. " in page.locator(".part .faint").first.inner_text()
    taken = re.search(r"Thing \d", page.locator(".verdict").inner_text())[0]
    after(page, page.get_by_label("Leave out").click)
    after(page, page.locator(".items").get_by_text(taken).click)
    assert "left out, as it is in the history" in page.locator(".verdict").inner_text()
    assert "Test user 5, history changed. " in page.locator(".part .faint").first.inner_text()


def test_titles_are_text_and_long_input_is_harmless(page):
    after(page, lambda: by_id(page, 5))
    assert '<b>"bold"</b>' in page.locator(".items").first.inner_text()
    assert "${alert(1)} {{x}} `" in page.locator(".ranking").inner_text()
    assert page.locator(".part b, .part script, .part img").count() == 0
    search = page.get_by_label("Search titles")
    search.fill("endless")
    page.get_by_role("button", name="Endless").wait_for()
    assert len(page.locator(".items button").first.inner_text()) < 200
    search.evaluate("box => box.removeAttribute('maxlength')")
    search.fill("<b>x</b> " * 1_200)
    page.get_by_text("No title has these words").wait_for()
    by_id(page, "<img src=x>" + "9" * 90)
    page.get_by_text("there is no test user").wait_for()
    assert page.locator("[data-testid=toast-text] img, .toast-text img").count() == 0


def test_yes_or_no_with_collaborative_knowledge_and_without(page):
    page.get_by_role("tab", name="collm").click()
    answers = after(page, lambda: by_id(page, 7))
    assert len(re.findall(r"Yes: \d+\.\d %", answers)) == 2
    assert re.search("Really: the user (liked|did not like) it", page.locator(".verdict").inner_text())
    visible = page.locator("button[data-role=ask]").locator("visible=true")
    after(page, visible.nth(1).click)
    assert page.locator(".verdict").count() == 0
    screenshot(page, "demo-yes-or-no")
    page.get_by_role("button", name="Clear").locator("visible=true").click()
    page.wait_for_function("!document.querySelector('.answers')")
    answers = after(page, visible.first.click)
    assert len(re.findall("Yes:", answers)) == 1 and "take a test user" in answers


def test_on_a_phone_nothing_scrolls_sideways(open_page, address):
    page = open_page(address, dark=True, width=390, height=800)
    page.locator(".items button").first.wait_for()
    after(page, lambda: by_id(page, 5))
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    screenshot(page, "demo-phone")


def test_visitors_wait_for_one_another_and_all_are_answered(open_page, address):
    pages = [open_page(address) for _ in range(4)]
    for page in pages:
        page.locator(".items button").first.wait_for()
    for user, page in enumerate(pages):
        by_id(page, user)
    tables = []
    for page in pages:
        page.locator(".ranking").wait_for()
        tables.append(page.locator(".ranking").inner_text())
    assert all("the first" in table for table in tables) and len(set(tables)) > 1


def test_no_click_is_lost_however_quick(page):
    page.evaluate("document.querySelectorAll('.items button').forEach(button => button.click())")
    page.wait_for_function("document.querySelectorAll('.chips button').length == 6")


def test_no_answer_in_time_is_said(open_page, tuned, data):
    with served("--ckpt_path", tuned, "--data_path", data, "--timeout", 0.0001) as (address, _):
        page = open_page(address)
        page.locator(".items button").first.wait_for()
        assert "no answer within 0.0001 seconds" in after(page, lambda: by_id(page, 5))
        page.close()  # before what it listens to


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_while_visitors_look_at_it(browser, heeded, tuned, data, end):
    with served("--ckpt_path", tuned, "--data_path", data) as (address, process):
        page = browser.new_page()
        page.goto(address)
        page.locator(".items button").first.wait_for()
        process.send_signal(end)
        assert process.wait(20) == 128 + end
        page.close()


def test_the_page_is_on_loopback_and_gives_no_files_whatever_the_environment_says(tuned, data):
    wanted = {
        "GRADIO_ALLOWED_PATHS": "/",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SHARE": "True",
        "GRADIO_DEBUG": "1",
    }
    dead = {"HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "example.com"}
    with served("--ckpt_path", tuned, "--data_path", data, **wanted, **dead) as (address, _):
        is_private(address)


def is_private(address):
    port = int(address.rsplit(":", 1)[1])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert [each for each in listening if each.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    for path in ("gradio_api/file=demo.py", "gradio_api/file=/etc/hostname", "monitoring", "gradio_api/runs"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/{path}", timeout=10)
