"""What is behind the page: titles are found, models answer as test.py measures them, requests wait and end."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import pytest
import torch

import demo
import finetune
import test as test_script
from reclingua import Recommender, Scorer
from reclingua.demo.app import THEME, Session, build_page, parse_pick, render_part
from reclingua.demo.next_item import NextItem
from reclingua.demo.worker import Worker
from reclingua.demo.yes_no import YesOrNo
from reclingua.inference.catalogue import MAX_TITLE_LENGTH, Catalogue
from reclingua.inference.rating_fusion import FusedScorer, RatingFusion
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import METADATA_FILE
from tests.helpers.scripts import predictions, second
from tests.helpers.toys import write_toy

HOSTILE = '<img src=x onerror="alert(1)"> ${alert(2)} {{alert}} `'


# ---- Titles ----


def test_titles_are_found_by_words_in_any_order_without_case_or_accents():
    titles = {"1": "Amélie of the Stars", "2": "Star Wars", "3": "The  Star", "4": "Fargo", "5": "ＳＴＡＲ Trek"}
    catalogue = Catalogue(titles, {"4": 9, "3": 5, "1": 2})
    assert catalogue.find("amelie") == ["1"] and catalogue.find("STARS of") == ["1"]
    assert catalogue.find("star") == ["2", "5", "3", "1"]  # what begins with it, then the popular
    assert catalogue.find("  ") == catalogue.find("") == ["4", "3", "1", "2", "5"]
    assert catalogue.find("", limit=2) == ["4", "3"] and catalogue.find("nothing") == []
    assert catalogue.find("x" * 10_000) == catalogue.find("fargo " * 2_000 + "x" * 10_000)[1:] == []
    assert "2" in catalogue and 2 not in catalogue and ["2"] not in catalogue


def test_a_long_title_is_cut_and_a_hostile_one_is_text():
    catalogue = Catalogue({"1": "long " * 3_000, "2": HOSTILE}, {})
    assert len(catalogue.title("1")) == MAX_TITLE_LENGTH
    roles = [("history", "a"), ("ask", "b")]
    for name, argument in (("search_results", roles[:1]), ("search_results", roles), ("history", "note")):
        page = render_part(name, [("2", catalogue.title("2"))], argument)
        assert "<img" not in page and "&lt;img" in page


def test_a_click_that_no_button_makes_is_nothing():
    catalogue = Catalogue({"1": "one"}, {})
    good = {"item": "1", "role": "history"}
    assert parse_pick(SimpleNamespace(_data=good), catalogue) == ("1", "history")
    for bad in (
        None,
        [],
        "1",
        {},
        {"item": "2", "role": "history"},
        {"item": ["1"], "role": "x"},
        {"item": "1", "role": 1},
    ):
        assert parse_pick(SimpleNamespace(_data=bad), catalogue) == ("", "")


# ---- Which item comes next? ----


@pytest.fixture(scope="module")
def next_item(workshop, tuned):
    return NextItem(Recommender.from_pretrained(tuned, workshop / "datasets"), num_beams=8)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_a_test_user_gets_the_list_of_test_py(script, workshop, tuned, next_item, tmp_path, exclude_seen):
    lines = tmp_path / "lines.jsonl"
    where = ("--ckpt_path", tuned, "--data_path", workshop / "datasets", "--results_file", tmp_path / "toy.json")
    more = ("--metrics", "hit@1", "--num_beams", 8, "--predictions_file", lines)
    assert script(test_script.main, *where, *more, *(["--exclude_seen"] if exclude_seen else []))[0] == 0
    for line in map(json.loads, lines.read_text().splitlines()[:10]):
        user, history, taken = next_item.test_user(line["user"])
        assert (user, taken) == (line["user"], line["target"])
        answer = next_item.ask("lcrec", history, 3, exclude_seen, taken)
        assert [row.title for row in answer.rows] == [f"Toy number {item}" for item in line["items"][:3]]
        assert [row.path for row in answer.rows] == line["indices"][:3]
        assert [float(row.score) for row in answer.rows] == pytest.approx(line["scores"][:3], abs=0.006)
        assert answer.place == (line["items"].index(taken) + 1 if taken in line["items"] else 0)
        assert [row.taken for row in answer.rows] == [item == taken for item in line["items"][:3]]


def test_baselines_answer_with_their_scores(next_item, monkeypatch):
    history = next_item.dataset.train_history("0")[:4]
    counts = sorted(next_item.baselines.popularity.values(), reverse=True)
    answer = next_item.ask("popularity", history, 5, False)
    assert [row.score for row in answer.rows] == [f"{n:,}" for n in counts[:5]]
    assert len(answer.rows) == 5 and answer.searched == 8 and answer.unit == "interactions"
    seen = {next_item.dataset.title(item) for item in history}
    for who in ("popularity", "co-occurrence"):
        assert not seen & {row.title for row in next_item.ask(who, history, 8, True).rows}
    model = next_item.baselines.models["popularity"]
    monkeypatch.setattr(model, "counts", model.counts.copy())
    model.counts[4] = 1_234_567
    assert next_item.ask("popularity", history, 5, False).rows[0].score == "1,234,567"
    monkeypatch.undo()
    scores = [float(row.score) for row in next_item.ask("co-occurrence", history, 8, False).rows]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0


def test_a_history_of_ones_own_is_cut_as_in_training(next_item):
    long = [str(item % 9) for item in range(500)]
    assert next_item.ask("lcrec", long, 3, False).rows == next_item.ask("lcrec", long[-3:], 3, False).rows
    with pytest.raises(InputError, match="no test user 'x'; user ids are 0"):
        next_item.test_user(" x ")
    assert next_item.test_user("")[0] in next_item.dataset.test_users


# ---- Will this user like this item? ----


@pytest.mark.parametrize("method, cf_model", [("collm", "sasrec"), ("binllm", "hash"), ("cora", "mf")])
def test_answers_are_those_of_test_py_with_knowledge_and_without(script, studio, tmp_path, method, cf_model):
    steps = ("--max_steps", 10, "--save_strategy", "no", "--learning_rate", 0.01, "--cf_model", studio / cf_model)
    assert script(finetune.main, *second(studio, method, tmp_path / "out", *steps))[0] == 0
    model = YesOrNo(Scorer.from_pretrained(tmp_path / "out", studio))
    _, warm = predictions(script, studio, tmp_path / "out")
    _, cold = predictions(script, studio, tmp_path / "out", "--cold_text_only")
    of_yes = lambda line: torch.tensor(model.scorer.model.log_odds(line["score"])).sigmoid().item()  # noqa: E731
    for at in (0, 100, len(warm) - 1):
        line = warm[at]
        his = [str(item) for item in model.test[at]["his"]]
        answer = model.ask(line["user"], his, str(line["item"]))
        if line["user"] <= 36:  # the others are unknown to training, as write_preferences has it
            assert answer.collaborative == pytest.approx(of_yes(line), abs=1e-4) and not answer.why_not
        else:
            assert answer.titles == pytest.approx(of_yes(cold[at]), abs=1e-4)
            assert (answer.collaborative is None) == (cf_model != "sasrec")  # which knows users by their history
    nobody = model.ask(None, ["1", "3"], "5")
    assert (nobody.collaborative is None) == (cf_model != "sasrec") == bool(nobody.why_not)
    assert 0 < model.ask(None, [], "5").titles < 1


def test_text_alone_has_one_answer_and_ratings_are_drawn_from_the_test(studio):
    model = YesOrNo(Scorer.from_pretrained(studio / "tallrec", studio))
    alone = model.ask(1, ["1"], "2")
    assert alone.collaborative is None and alone.fused is None
    weights = {"tallrec": 1.0, "item like-rate": 0.0, "user like-rate": 0.0}
    model.fused = FusedScorer(model.scorer, RatingFusion(weights, intercept=0.5))
    fused = torch.tensor(alone.titles).logit().add(0.5).sigmoid().item()
    assert model.ask(1, ["1"], "2").fused == pytest.approx(fused, abs=1e-4)
    rating = model.test_rating("7")
    row = next(r for r in model.test if r["uid"] == 7 and str(r["iid"]) == rating.item)
    assert (rating.user, rating.liked, rating.history) == (7, bool(row["label"]), [str(i) for i in row["his"]])
    assert model.test_rating("").user in range(1, 41)
    for bad in ("0", "41", "-1", "seven", "9" * 10_000, "<b>"):
        with pytest.raises(InputError, match="has no test ratings; user ids are 1, 2, 3"):
            model.test_rating(bad)


# ---- Requests ----


def test_a_request_that_takes_too_long_is_told_and_the_next_one_is_answered():
    worker, done = Worker(0.3), []

    async def ask_all():
        slow = asyncio.create_task(worker(lambda: (time.sleep(0.5), done.append("slow"))))
        await asyncio.sleep(0)
        queued = asyncio.create_task(worker(done.append, "queued"))
        with pytest.raises(InputError, match="no answer within 0.3 seconds"):
            await slow
        with pytest.raises(InputError, match="no answer within"):
            await queued
        await asyncio.sleep(0.4)
        return await worker(lambda: "answer")

    assert asyncio.run(ask_all()) == "answer"
    assert done == ["slow"]  # what had not begun was dropped


def test_the_time_of_a_request_is_with_the_wait_for_others(next_item, monkeypatch):
    ask = NextItem.ask
    monkeypatch.setattr(NextItem, "ask", lambda *args: (time.sleep(0.6), ask(*args))[1])
    page = build_page({"toy": next_item}, 1.5)
    (asks,) = [number for number, each in page.fns.items() if each.name == "recommend"]
    page.launch(server_name=demo.HOST, server_port=demo.free_port(None), quiet=True, prevent_thread_lock=True, **THEME)

    def answer(visitor):
        about = {"fn_index": asks, "data": [None, "popularity", 5, True], "session_hash": visitor}
        queue = f"{page.local_url}gradio_api/queue"
        httpx2.post(f"{queue}/join", json=about).raise_for_status()
        with httpx2.stream("GET", f"{queue}/data", params={"session_hash": visitor}, timeout=30) as events:
            return next(event for event in events.iter_lines() if "process_completed" in event)

    try:
        with ThreadPoolExecutor(8) as visitors:
            answers = list(visitors.map(answer, "abcdefgh"))
    finally:
        page.close(verbose=False)
    assert any("ranking" in answer for answer in answers)
    assert any("no answer within 1.5 seconds" in answer for answer in answers)  # the eighth would wait 5 seconds


def test_what_goes_wrong_in_the_thread_is_told():
    def fail():
        raise InputError("too long")

    with pytest.raises(InputError, match="too long"):
        asyncio.run(Worker(5)(fail))


def test_visits_that_are_alike_are_equal():  # or every event would ask the model again
    assert Session(("1",), "2") == Session(("1",), "2") != Session(("1",), "3")


# ---- Bad input ----


def test_bad_input(refused, workshop, tuned, studio, tmp_path):
    write_toy(tmp_path, users=5)
    data = ("--data_path", workshop / "datasets")

    def refuse(*argv):
        return refused(demo.main, *argv)

    assert "no such file" in refuse("--ckpt_path", tmp_path / "nothing")
    assert "collaborative model alone" in refuse("--ckpt_path", studio / "mf")
    assert "given twice" in refuse("--ckpt_path", tuned, tuned)
    assert "no such dataset folder" in refuse("--ckpt_path", tuned, *data, "--dataset", "other")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / METADATA_FILE).write_text(json.dumps({"method": "lcrec", "dataset": "toy"}))
    assert "was tuned by another version" in refuse("--ckpt_path", tmp_path / "old", *data)
    assert "no such dataset folder" in refuse("--ckpt_path", studio / "tallrec", "--data_path", tmp_path)
    assert "--num_beams 0" in refuse("--ckpt_path", tuned, *data, "--num_beams", 0)
    assert "--timeout 0" in refuse("--ckpt_path", tuned, *data, "--timeout", 0)
    assert "--port 70000" in refuse("--ckpt_path", tuned, *data, "--port", 70000)
    with socket.socket() as taken:
        taken.bind((demo.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot be listened at" in refuse("--ckpt_path", tuned, *data, "--port", port)
        assert demo.free_port(None) in demo.PORTS
    (tmp_path / "toy" / "toy.index.json").write_text(json.dumps({str(i): [f"<a_{i}>"] for i in range(9)}))
    theirs = ("--data_path", tmp_path, "--index_file", ".index.json")
    assert "other semantic IDs" in refuse("--ckpt_path", tuned, *theirs)
