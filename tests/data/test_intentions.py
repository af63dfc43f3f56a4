"""Users' texts by a chat model: what it is asked, which answers pass, and an endpoint at its worst."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from data import chat, intentions
from data.chat import Endpoint, Sampling
from reclingua.datasets.interactions import open_dataset
from reclingua.datasets.user_texts import read_users
from tests.helpers.chat_server import body, closes, completion, prompts_of, serving, status, wise

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Failures are tried again at once, and no proxy of the machine stands between test and server."""
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def where(toy, tmp_path):
    """Flags: the toy dataset, and an output beside nothing else."""
    return "--dataset", "toy", "--data_path", toy, "--output", tmp_path / "out" / "toy.user.json"


def at(server, *more):
    return "--endpoint", server.url, "--model", "wise", *more


def files(where):
    return sorted(path.name for path in where[-1].parent.iterdir())


@pytest.fixture
def undisturbed(script, where, toy, tmp_path):
    """The file that a run makes when nothing goes wrong."""
    output = tmp_path / "undisturbed" / "toy.user.json"
    with serving(wise) as server:
        code, out, error = script(intentions.main, *where[:-1], output, *at(server))
    assert code == 0, error
    return output.read_bytes()


# ---- What is asked, and what comes of it ----


def test_every_user_gets_preferences_and_intentions(script, where, toy):
    with serving(wise) as server:
        code, out, error = script(intentions.main, *where, *at(server))
    assert code == 0, error
    dataset = open_dataset(toy, "toy")
    texts = read_users(dataset, where[-1])
    assert list(texts.preferences) == list(dataset.histories)
    assert all(len(set(given)) == 3 for given in texts.preferences.values())
    assert list(texts.intentions["train"]) == list(texts.intentions["test"]) == list(dataset.histories)
    found = texts.intentions["test"]["0"]
    assert found.item == "5" and found.history == ["0", "1", "2", "3", "4"] and found.of_user != found.of_item
    assert files(where) == ["toy.user.json", "toy.user.run.json"]
    assert "preferences: 12 users, 0 left out" in out and "user 0 was looking for: Somebody wishes" in out
    assert len(set(prompts_of(server))) == len(server.requests)  # what two users would ask alike is asked once
    facts = json.loads((where[-1].parent / "toy.user.run.json").read_text())
    assert facts["answers"] == len(server.requests) and facts["arguments"]["model"] == "wise"


def test_when_it_is_complete_nothing_is_asked_again(script, refused, where):
    with serving(wise) as server:
        script(intentions.main, *where, *at(server))
        asked, made = len(server.requests), where[-1].read_bytes()
        code, out, _ = script(intentions.main, *where, *at(server))
        assert code == 0 and "nothing to do" in out and len(server.requests) == asked
        for other in (("--users", 2), ("--seed", 1), ("--model", "other")):
            assert "was not made with these settings" in refused(intentions.main, *where, *at(server), *other)
    assert where[-1].read_bytes() == made


def test_a_file_of_somebody_else_is_not_replaced(refused, where):
    where[-1].parent.mkdir()
    where[-1].write_text("mine")
    assert "was not made with these settings" in refused(
        intentions.main, *where, "--endpoint", "http://h/v1", "--model", "m"
    )
    assert where[-1].read_text() == "mine"


def test_nothing_held_out_is_told_where_training_is_written(script, where, toy, edit):
    names = ["apple", "pear", "plum", "fig", "grape", "cherry", "lemon", "lime", "melon"]
    edit(
        "item",
        lambda item: {i: {"title": f"Fruit {name}", "description": f"of {name}"} for i, name in enumerate(names)},
    )
    # User 0 has 0 to 5; user 1 has its valid item, 4, and its test item, 2, in the training history as well.
    edit("inter", lambda inter: {"0": inter["0"], "1": [2, 4, 6, 7, 4, 2]})
    for user, before, train, test in (("0", {0, 1, 2}, 3, 5), ("1", {2, 4, 6}, 7, 2)):
        content = json.loads((toy / "toy/toy.inter.json").read_text())
        edit("inter", lambda inter, user=user: {user: inter[user]})
        with serving(wise) as server:
            code, _, error = script(
                intentions.main, *where[:-1], where[-1].with_name(f"{user}.user.json"), *at(server)
            )
        assert code == 0, error
        told = [{i for i, name in enumerate(names) if name in prompt} for prompt in prompts_of(server)]
        assert sorted(told, key=sorted) == sorted([before] * 3 + [{train}] * 2 + [{test}] * 2, key=sorted)
        edit("inter", lambda inter, content=content: content)


def test_real_users_prompts_hold_no_title_held_out(shared):
    dataset = open_dataset(shared / "data", "Industrial", ["items"])
    planner = intentions.Planner(
        dataset,
        intentions.read_prompts(intentions.LCREC_PROMPT_FILE, intentions.FIELDS),
        Endpoint("http://h/v1", "m", Sampling()),
        20,
    )
    users = list(dataset.histories)[:300]
    checked = 0
    for (section, user), requests in planner.plan(users).items():
        told = dataset.train_history(user) if section == "train" else dataset.train_history(user)[:-1]
        known = " ".join(dataset.text(item) for item in told)
        for item in dataset.histories[user][-3:]:
            if section != "test" and dataset.title(item)[:60] not in known:
                checked += 1
                assert not any(dataset.title(item)[:60] in request.prompt for request in requests)
    assert checked > 1000


def test_short_users_have_what_their_history_allows(script, where, toy, edit):
    edit("inter", lambda inter: inter.update({"short": [1, 2], "shorter": [1], "three": [1, 2, 3]}))
    with serving(wise) as server:
        assert script(intentions.main, *where, *at(server))[0] == 0
    texts = read_users(open_dataset(toy, "toy"), where[-1])
    assert texts.intentions["train"]["short"].item == "2" and "short" not in texts.intentions["test"]
    assert "short" in texts.preferences and not {"shorter", "three"} & set(texts.preferences)
    assert texts.intentions["train"]["three"].history == [] and texts.intentions["test"]["three"].item == "3"


def test_some_users_only(script, where, toy):
    with serving(wise) as server:
        assert script(intentions.main, *where, *at(server), "--users", 2)[0] == 0
    assert list(read_users(open_dataset(toy, "toy"), where[-1]).preferences) == ["0", "1"]


def test_phrasings_take_turns(script, where, tmp_path):
    prompts = {task: [{"prompt": f"{task} {{history}}"}] for task in ("general", "lasting")}
    prompts |= {"recent": [{"prompt": "recent {recent}"}], "of_item": [{"prompt": "of_item {item}"}]}
    prompts["of_user"] = [{"prompt": "first {item}"}, {"prompt": "second {item}"}]
    (tmp_path / "prompts.yaml").write_text(json.dumps(prompts))  # JSON is YAML
    with serving(wise) as server:
        code, _, error = script(intentions.main, *where, *at(server), "--prompt_file", tmp_path / "prompts.yaml")
    assert code == 0, error
    asked = {prompt.split()[0] for prompt in prompts_of(server)}
    assert asked == {"general", "lasting", "recent", "of_item", "first", "second"}


def test_what_is_refused_is_asked_again_and_then_left_out(script, where, toy):
    def names_item_five(number, request):
        prompt = request["messages"][0]["content"]
        if prompt.startswith("Product: Toy number 5."):
            return completion("I want the Toy number 5, please.")
        # The first answer to anything is of no use.
        return wise(number, request) if request["temperature"] else completion("")

    with serving(names_item_five) as server:
        code, out, error = script(intentions.main, *where, *at(server))
    assert code == 0, error
    texts = read_users(open_dataset(toy, "toy"), where[-1])
    left_out = {user for user, history in open_dataset(toy, "toy").histories.items() if history[-1] == "5"}
    assert left_out and set(texts.intentions["test"]).isdisjoint(left_out)
    assert len(texts.intentions["test"]) == 12 - len(left_out) and len(texts.preferences) == 12
    assert f"intentions of test: {12 - len(left_out)} users, {len(left_out)} left out" in out
    assert "names the item" in out and "empty or too short" in out
    assert "Toy number 5" not in json.dumps([where[-1].read_text()])
    seeds = {}
    for request in server.requests:
        seeds.setdefault(request["messages"][0]["content"], []).append(request.get("seed"))
    assert all(asked[0] is None and len(set(asked)) == len(asked) <= 3 for asked in seeds.values())


def test_a_model_without_one_good_answer_is_refused(refused, where):
    with serving(body(completion("")[1])) as server:
        message = refused(intentions.main, *where, *at(server), "--users", 1)
    assert "no answer of wise was of use (21 empty or too short)" in message and not where[-1].exists()


# ---- An endpoint at its worst ----

HUGE = completion("words " * 400_000)[1]
TROUBLES = {
    "500": status(500),
    "503": status(503),
    "429": status(429, retry_after="0"),
    "429 until a date": status(429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 until nonsense": status(429, retry_after="soon"),
    "stalls": "stalls",
    "closes the connection": closes,
    "no JSON": body(b"{"),
    "nothing": body(b""),
    "HTML": body(b"<html>Welcome</html>"),
    "no choices": body(b'{"object": "chat.completion"}'),
    "empty choices": body(b'{"choices": []}'),
    "a list": body(b"[1]"),
    "choice a text": body(b'{"choices": ["x"]}'),
    "content a list": body(b'{"choices": [{"message": {"content": [1]}}]}'),
    "a number too long": body(b'{"choices": ' + b"1" * 5000 + b"}"),
    "nested": body(b'{"choices": ' + b"[" * 100_000),
    "more than fits": body(HUGE),
    "not the bytes it promises": status(200, b"xx", content_encoding="gzip"),
}


def test_trouble_that_passes_changes_nothing(script, where, undisturbed):
    with serving(*TROUBLES.values(), wise) as server:
        code, _, error = script(
            intentions.main, *where, *at(server), "--timeout", 1, "--concurrency", 4, "--retries", 30
        )
    assert code == 0, error
    assert where[-1].read_bytes() == undisturbed


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_stays_ends_in_one_line_and_keeps_what_was_done(refused, where, trouble):
    few = ("--timeout", 0.3, "--concurrency", 1, "--retries", 1)
    with serving(wise, wise, wise, TROUBLES[trouble]) as server:
        message = refused(intentions.main, *where, *at(server, *few))
        assert len(server.requests) == 5
    assert "failed 2 times" in message and len(message) < 700
    assert f"3 answers are kept in {where[-1].parent}/toy.user.journal.jsonl: give the command again" in message
    assert files(where) == ["toy.user.journal.jsonl"]


def test_another_server_of_the_model_goes_on(refused, script, where, undisturbed):
    with serving(wise, wise, wise, status(500)) as server:
        refused(intentions.main, *where, *at(server), "--concurrency", 1, "--retries", 0)
    with serving(wise) as other:
        assert "was begun with other model" in refused(intentions.main, *where, *at(other), "--model", "m")
        assert script(intentions.main, *where, *at(other))[0] == 0
    assert set(prompts_of(server)[:3]).isdisjoint(prompts_of(other)) and where[-1].read_bytes() == undisturbed


@pytest.mark.parametrize("code", [301, 400, 401, 403, 404, 422])
def test_refusal_ends_at_once(refused, where, code):
    with serving(status(code, b"no such thing \xff\n here")) as server:
        message = refused(intentions.main, *where, *at(server), "--concurrency", 1)
        assert len(server.requests) == 1
    assert f"status {code}: no such thing ? here" in message and files(where) == []


def test_who_is_not_there_is_told_at_once(refused, where, monkeypatch):
    with serving(wise) as server:
        pass
    monkeypatch.setattr(chat, "FIRST_WAIT", 1e9)
    assert "cannot be reached (ConnectError" in refused(intentions.main, *where, *at(server))
    assert files(where) == []


def test_a_server_that_goes_away_is_waited_for(refused, script, where):
    with serving(wise) as server:

        def last(number, request):
            Thread(target=server.shutdown).start()
            server.socket.close()
            return wise(number, request)

        server.replies = (wise, last, closes)
        message = refused(intentions.main, *where, *at(server), "--concurrency", 1, "--retries", 2)
    assert "failed 3 times" in message and "2 answers are kept" in message


def test_retry_after_is_waited_for_by_all(script, where):
    with serving(wise, status(429, retry_after="1"), wise) as server:
        assert script(intentions.main, *where, *at(server), "--concurrency", 3, "--users", 2)[0] == 0
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert max(gaps) > 0.9


def test_who_asks_for_too_long_a_wait_is_not_waited_for(refused, where):
    with serving(status(429, b"come back tomorrow", retry_after="86400")) as server:
        message = refused(intentions.main, *where, *at(server))
    assert "asks to wait 86400 seconds; status 429: come back tomorrow" in message


def test_requests_a_minute_are_limited(script, where):
    with serving(wise) as server:
        code, _, error = script(
            intentions.main, *where, *at(server), "--users", 1, "--concurrency", 4, "--requests_per_minute", 600
        )
    assert code == 0, error
    assert len(server.times) == 7 and server.times[-1] - server.times[0] > 0.55


def test_requests_run_side_by_side(script, where):
    def slow(number, request):
        time.sleep(0.2)
        return wise(number, request)

    with serving(slow) as server:
        assert script(intentions.main, *where, *at(server), "--users", 1, "--concurrency", 7)[0] == 0
    assert server.times[-1] - server.times[0] < 0.2 * 6  # what one after another takes


def test_the_key_is_sent_and_shown_nowhere(script, where, monkeypatch, toy):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    flags = ("--api_key_env", "MY_KEY", "--users", 3, "--concurrency", 1)
    echo = completion(f"Your key is {KEY}, my friend.")

    shown = ""
    with serving(wise, lambda *_: echo, status(500, KEY.encode()), status(401, f"bad key: {KEY}".encode())) as server:
        code, *outputs = script(intentions.main, *where, *at(server), *flags)
        assert code == 2 and "bad key: ***" in outputs[1]
        shown += "".join(outputs) + "".join(path.read_text() for path in where[-1].parent.iterdir())
        server.replies = (wise,)
        code, *outputs = script(intentions.main, *where, *at(server), *flags)
        assert code == 0
    shown += "".join(outputs) + "".join(path.read_text() for path in where[-1].parent.iterdir())
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in shown and "Your key is *, my friend." in shown and "MY_KEY" in shown


def test_without_a_key_none_is_sent(script, where):
    with serving(wise) as server:
        assert script(intentions.main, *where, *at(server), "--users", 1)[0] == 0
    assert set(server.keys) == {None}


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(refused, where, monkeypatch):
    for key in ("sk-gehöim-1234", "sk-secret\n1234"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        message = refused(intentions.main, *where, "--endpoint", "http://h/v1", "--model", "m")
        assert "API key holds characters" in message and "1234" not in message


# ---- Killed and resumed ----


def test_killed_half_way_it_ends_with_the_same_file(script, where, undisturbed):
    with serving(*[wise] * 20, "stalls") as server:
        command = [sys.executable, "-m", "data.intentions", *map(str, where), *at(server)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"})
        journal = where[-1].parent / "toy.user.journal.jsonl"
        deadline = time.monotonic() + 240
        while not (journal.exists() and journal.read_bytes().count(b"\n") == 21):  # a line says what made it
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with journal.open("ab") as file:
            file.write(b'{"of": "half a li')
        asked = {*prompts_of(server)[:20]}
        server.replies = (wise,)
        begun = len(server.requests)
        code, out, error = script(intentions.main, *where, *at(server))
    assert code == 0, error
    assert "20 answers from" in out and where[-1].read_bytes() == undisturbed
    assert asked.isdisjoint(prompts_of(server)[begun:])
    assert files(where) == ["toy.user.json", "toy.user.run.json"]


# ---- A model that runs here ----


def test_with_smollm2(script, where, smollm2, shared):
    """The real model, a real user."""
    data = ("--dataset", "Industrial", "--data_path", shared / "data", "--output", where[-1], "--users", 1)
    brief = ("--max_his_len", 2, "--max_new_tokens", 24, "--attempts", 2)
    code, out, error = script(intentions.main, *data, "--model", smollm2, *brief)
    assert code == 0, error
    assert "7 texts for 1 users" in out
    texts = read_users(open_dataset(shared / "data", "Industrial"), where[-1])
    assert all(10 <= len(text) <= 500 for text in texts.preferences["0"])


# ---- Bad input ----


def bad_prompts(change):
    def flags(toy, tmp_path):
        prompts = intentions.read_prompts(intentions.LCREC_PROMPT_FILE, intentions.FIELDS)
        content = {task: [{"prompt": template.prompt} for template in given] for task, given in prompts.items()}
        change(content)
        (tmp_path / "prompts.yaml").write_text(json.dumps(content))
        return "--endpoint", "http://h/v1", "--model", "m", "--prompt_file", tmp_path / "prompts.yaml"

    return flags


def without_texts(toy, tmp_path):
    (toy / "toy/toy.item.json").unlink()
    return REMOTE


REMOTE = ("--endpoint", "http://h/v1", "--model", "m")
BAD = {
    "endpoint without model": (("--endpoint", "http://h/v1"), "--endpoint needs the --model"),
    "no such model": (("--model", "./no/where"), "no/where: no tokenizer could be loaded"),
    "no default model": ((), "python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct makes it"),
    "no such dataset": (("--dataset", "none"), "no such dataset folder"),
    "no item texts": (without_texts, "toy.item.json: no such file"),
    "no scheme": (("--endpoint", "host:80/v1", "--model", "m"), "should be like http://host:port/v1"),
    "a bad port": (("--endpoint", "http://h:port/v1", "--model", "m"), "should be like http://host:port/v1"),
    "a password": (("--endpoint", "http://me:pw@h/v1", "--model", "m"), "should hold no password"),
    "a query": (("--endpoint", "http://h/v1?key=pw", "--model", "m"), "should be like http://host:port/v1"),
    "key for a variable": ((*REMOTE, "--api_key_env", KEY), "there is no such environment variable"),
    "no users": ((*REMOTE, "--users", 0), "--users 0: should be 1 at least"),
    "concurrency": ((*REMOTE, "--concurrency", 0), "--concurrency 0: should be 1 at least"),
    "timeout": ((*REMOTE, "--timeout", "nan"), "--timeout nan: should be above 0"),
    "temperature": ((*REMOTE, "--temperature", 3), "--temperature should be between 0 and 2"),
    "retries": ((*REMOTE, "--retries", -1), "--retries 0 at least"),
    "batches at an endpoint": ((*REMOTE, "--batch_size", 4), "--batch_size means nothing with --endpoint"),
    "requests of a local model": (("--concurrency", 4), "--concurrency means nothing without --endpoint"),
    "no prompt file": ((*REMOTE, "--prompt_file", "none.yaml"), "none.yaml: no such prompt file"),
    "task missing": (bad_prompts(lambda c: c.pop("recent")), "task 'recent' has no phrasing"),
    "unknown field": (bad_prompts(lambda c: c["of_item"][0].update(prompt="{item} {user}")), "unknown field {user}"),
    "missing field": (bad_prompts(lambda c: c["general"][0].update(prompt="Hi")), "lacks the field {history} or"),
    "held out": (bad_prompts(lambda c: c["general"][0].update(prompt="{history}{item}")), "unknown field {item}"),
    "output a folder": ((*REMOTE, "--output", "."), "is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(refused, where, toy, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, message = BAD[case]
    said = refused(intentions.main, *where, *(given(toy, tmp_path) if callable(given) else given))
    assert message in said and "pw" not in said and KEY not in said


def test_a_folder_that_cannot_be_written_needs_another_output(refused, where, toy, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(intentions.main, *where[:-1], tmp_path / "file" / "x.user.json", *REMOTE)
    assert "cannot be written" in message
