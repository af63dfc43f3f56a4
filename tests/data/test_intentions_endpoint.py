"""User texts from an endpoint that fails, and runs that are killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from data import chat, intentions
from tests.helpers.chat_server import (
    answer_from_prompt,
    body,
    close_connection,
    completion,
    run_server,
    sent_prompts,
    status,
)
from tests.helpers.intentions import KEY, endpoint_flags, output_files

pytestmark = pytest.mark.usefixtures("fast_retries")


# ---- Endpoints that fail ----

HUGE = completion("words " * 400_000)[1]
FAILURES = {
    "500": status(500),
    "503": status(503),
    "429": status(429, retry_after="0"),
    "429 until a date": status(429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 until an invalid date": status(429, retry_after="soon"),
    "stalls": "stalls",
    "closes the connection": close_connection,
    "no JSON": body(b"{"),
    "nothing": body(b""),
    "HTML": body(b"<html>Welcome</html>"),
    "no choices": body(b'{"object": "chat.completion"}'),
    "empty choices": body(b'{"choices": []}'),
    "a list": body(b"[1]"),
    "choice a text": body(b'{"choices": ["x"]}'),
    "content a list": body(b'{"choices": [{"message": {"content": [1]}}]}'),
    "too long a number": body(b'{"choices": ' + b"1" * 5000 + b"}"),
    "nested": body(b'{"choices": ' + b"[" * 100_000),
    "too large": body(HUGE),
    "invalid gzip": status(200, b"xx", content_encoding="gzip"),
}


def test_transient_errors_do_not_change_the_output(script, paths, expected_output):
    with run_server(*FAILURES.values(), answer_from_prompt) as server:
        code, _, error = script(
            intentions.main, *paths, *endpoint_flags(server), "--timeout", 1, "--concurrency", 4, "--retries", 30
        )
    assert code == 0, error
    assert paths[-1].read_bytes() == expected_output


@pytest.mark.parametrize("failure", FAILURES)
def test_permanent_failures_end_in_one_line_and_keep_the_answers(refused, paths, failure):
    flags = ("--timeout", 0.3, "--concurrency", 1, "--retries", 1)
    with run_server(*[answer_from_prompt] * 3, FAILURES[failure]) as server:
        message = refused(intentions.main, *paths, *endpoint_flags(server, *flags))
        assert len(server.requests) == 5
    assert "failed 2 times" in message and len(message) < 700
    assert f"3 answers are saved in {paths[-1].parent}/toy.user.journal.jsonl: run the same command" in message
    assert output_files(paths) == ["toy.user.journal.jsonl"]


def test_another_server_of_the_same_model_resumes(refused, script, paths, expected_output):
    with run_server(answer_from_prompt, answer_from_prompt, answer_from_prompt, status(500)) as server:
        refused(intentions.main, *paths, *endpoint_flags(server), "--concurrency", 1, "--retries", 0)
    with run_server(answer_from_prompt) as other:
        assert "was made with other model" in refused(intentions.main, *paths, *endpoint_flags(other), "--model", "m")
        assert script(intentions.main, *paths, *endpoint_flags(other))[0] == 0
    assert set(sent_prompts(server)[:3]).isdisjoint(sent_prompts(other)) and paths[-1].read_bytes() == expected_output


@pytest.mark.parametrize("code", [301, 400, 401, 403, 404, 422])
def test_client_errors_are_not_retried(refused, paths, code):
    with run_server(status(code, b"no such thing \xff\n here")) as server:
        message = refused(intentions.main, *paths, *endpoint_flags(server), "--concurrency", 1)
        assert len(server.requests) == 1
    assert f"status {code}: no such thing ? here" in message and output_files(paths) == []


def test_an_unreachable_server_is_not_retried(refused, paths, monkeypatch):
    with run_server(answer_from_prompt) as server:
        pass
    monkeypatch.setattr(chat, "INITIAL_BACKOFF", 1e9)
    assert "cannot be reached (ConnectError" in refused(intentions.main, *paths, *endpoint_flags(server))
    assert output_files(paths) == []


def test_a_lost_server_is_retried(refused, script, paths):
    with run_server(answer_from_prompt) as server:

        def answer_and_stop(number, request):
            Thread(target=server.shutdown).start()
            server.socket.close()
            return answer_from_prompt(number, request)

        server.responses = (answer_from_prompt, answer_and_stop, close_connection)
        message = refused(intentions.main, *paths, *endpoint_flags(server), "--concurrency", 1, "--retries", 2)
    assert "failed 3 times" in message and "2 answers are saved" in message


def test_retry_after_delays_all_requests(script, paths):
    with run_server(answer_from_prompt, status(429, retry_after="1"), answer_from_prompt) as server:
        assert script(intentions.main, *paths, *endpoint_flags(server), "--concurrency", 3, "--users", 2)[0] == 0
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert max(gaps) > 0.9


def test_too_long_a_retry_after_is_not_awaited(refused, paths):
    with run_server(status(429, b"come back tomorrow", retry_after="86400")) as server:
        message = refused(intentions.main, *paths, *endpoint_flags(server))
    assert "a wait of 86400 seconds; status 429: come back tomorrow" in message


def test_requests_per_minute_are_limited(script, paths):
    with run_server(answer_from_prompt) as server:
        code, _, error = script(
            intentions.main,
            *paths,
            *endpoint_flags(server),
            "--users",
            1,
            "--concurrency",
            4,
            "--requests_per_minute",
            600,
        )
    assert code == 0, error
    assert len(server.times) == 7 and server.times[-1] - server.times[0] > 0.55


def test_requests_are_concurrent(script, paths):
    def slow(number, request):
        time.sleep(0.2)
        return answer_from_prompt(number, request)

    with run_server(slow) as server:
        assert script(intentions.main, *paths, *endpoint_flags(server), "--users", 1, "--concurrency", 7)[0] == 0
    assert server.times[-1] - server.times[0] < 0.2 * 6  # the duration of sequential requests


def test_the_key_is_sent_and_never_printed(script, paths, monkeypatch, toy):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    flags = ("--api_key_env", "MY_KEY", "--users", 3, "--concurrency", 1)
    echo = completion(f"Your key is {KEY}, my friend.")

    printed = ""
    with run_server(
        answer_from_prompt, lambda *_: echo, status(500, KEY.encode()), status(401, f"bad key: {KEY}".encode())
    ) as server:
        code, *outputs = script(intentions.main, *paths, *endpoint_flags(server), *flags)
        assert code == 2 and "bad key: ***" in outputs[1]
        printed += "".join(outputs) + "".join(path.read_text() for path in paths[-1].parent.iterdir())
        server.responses = (answer_from_prompt,)
        code, *outputs = script(intentions.main, *paths, *endpoint_flags(server), *flags)
        assert code == 0
    printed += "".join(outputs) + "".join(path.read_text() for path in paths[-1].parent.iterdir())
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in printed and "Your key is *, my friend." in printed and "MY_KEY" in printed


def test_without_a_key_no_header_is_sent(script, paths):
    with run_server(answer_from_prompt) as server:
        assert script(intentions.main, *paths, *endpoint_flags(server), "--users", 1)[0] == 0
    assert set(server.keys) == {None}


def test_an_invalid_key_is_rejected_without_printing_it(refused, paths, monkeypatch):
    for key in ("sk-gehöim-1234", "sk-secret\n1234"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        message = refused(intentions.main, *paths, "--endpoint", "http://h/v1", "--model", "m")
        assert "API key contains invalid characters" in message and "1234" not in message


# ---- Killed and resumed ----


@pytest.mark.slow
def test_a_killed_run_resumes_and_writes_the_same_file(script, paths, expected_output):
    with run_server(*[answer_from_prompt] * 20, "stalls") as server:
        command = [sys.executable, "-m", "data.intentions", *map(str, paths), *endpoint_flags(server)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"})
        journal = paths[-1].parent / "toy.user.journal.jsonl"
        deadline = time.monotonic() + 240
        while not (journal.exists() and journal.read_bytes().count(b"\n") == 21):  # line 1: settings
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with journal.open("ab") as file:
            file.write(b'{"request": "half a li')
        answered = {*sent_prompts(server)[:20]}
        server.responses = (answer_from_prompt,)
        num_requests = len(server.requests)
        code, out, error = script(intentions.main, *paths, *endpoint_flags(server))
    assert code == 0, error
    assert "20 answers from" in out and paths[-1].read_bytes() == expected_output
    assert answered.isdisjoint(sent_prompts(server)[num_requests:])
    assert output_files(paths) == ["toy.user.json", "toy.user.run.json"]
