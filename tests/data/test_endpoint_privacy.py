"""User texts by an endpoint: the screen states who gets the users' data, and warns if it travels unencrypted."""

import pytest

from data import intentions
from data.chat import Endpoint
from reclingua.utils.errors import InputError
from tests.helpers.chat_server import answer_from_prompt, run_server, status

KEY = "sk-secret-0123456789"


@pytest.fixture
def flags(toy, tmp_path, monkeypatch):
    """Flags: the toy dataset of 12 users, an output in a folder of its own, a model's name; a dead proxy, no key."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # loopback endpoints do without
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    output = tmp_path / "out" / "toy.user.json"
    return "--dataset", "toy", "--data_path", toy, "--output", output, "--model", "chatty"


@pytest.fixture
def screen_before_asking(script, flags, monkeypatch, capsys):
    """screen_before_asking(url): stdout and stderr of a run until it sends the first request, which is not sent."""

    def run(url):
        screens = []

        def stop(endpoint, questions, on_answer):
            screens.append(capsys.readouterr())
            raise InputError("nothing is sent")

        monkeypatch.setattr(Endpoint, "ask", stop)
        assert script(intentions.main, *flags, "--endpoint", url)[0] == 2
        return screens[0]

    return run


def test_the_recipient_is_stated_before_the_first_request(screen_before_asking):
    out, error = screen_before_asking("https://api.example.com/v1")
    assert "histories and item texts of 12 users are sent to api.example.com\n" in out and error == ""


@pytest.mark.parametrize("host", ["example.com", "example.com:8000", "10.0.0.1", "[2001:db8::1]:80", "127.a.com"])
def test_unencrypted_requests_to_another_machine_are_warned_about(screen_before_asking, host):
    out, error = screen_before_asking(f"http://{host}/v1")
    name = host.removesuffix(":80")  # the default port
    assert f"of 12 users are sent to {name}\n" in out
    assert error == f"warning: histories travel unencrypted over http to {name}; prefer https\n"


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/v1",
        "HTTP://LocalHost/v1",
        "http://127.0.0.1/v1",
        "http://127.8.9.10:1/v1",
        "http://[::1]:8000/v1",
    ],
)
def test_loopback_is_not_warned_about(screen_before_asking, url):
    out, error = screen_before_asking(url)
    assert "of 12 users are sent to " in out and error == ""


def test_the_warning_mentions_the_key_and_does_not_print_it(screen_before_asking, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out, error = screen_before_asking("http://example.com/v1")
    assert error.startswith("warning: histories and the API key travel unencrypted") and error.count("\n") == 1
    assert KEY not in out + error
    assert screen_before_asking("https://example.com/v1").err == ""


def test_a_resumed_run_counts_the_users_that_are_left(script, flags):
    brief = ("--users", 2, "--concurrency", 1, "--retries", 0)
    with run_server(*[answer_from_prompt] * 7, status(401), answer_from_prompt) as server:
        code, out, _ = script(intentions.main, *flags, "--endpoint", server.url, *brief)
        assert code == 2 and f"of 2 users are sent to 127.0.0.1:{server.server_port}\n" in out
        code, out, error = script(intentions.main, *flags, "--endpoint", server.url, *brief)
    assert code == 0, error
    assert "7 answers from" in out and "of 1 users are sent to" in out


def test_nothing_is_stated_if_no_request_is_left(script, flags, monkeypatch):
    def disk_full(*_):
        raise InputError("disk full")

    with run_server(answer_from_prompt) as server, monkeypatch.context() as patched:
        patched.setattr(intentions, "write_user_texts", disk_full)
        assert script(intentions.main, *flags, "--endpoint", server.url)[0] == 2
    code, out, error = script(intentions.main, *flags, "--endpoint", "http://example.com/v1")
    assert code == 0, error
    assert "are sent to" not in out and error == ""


def test_a_local_model_has_no_recipient(script, flags, monkeypatch):
    class Local:
        def fits(self, prompt):
            return True

        def ask(self, questions, on_answer):
            raise InputError("asked")

    monkeypatch.setattr(intentions, "load_chat", lambda *_: Local())
    code, out, error = script(intentions.main, *flags)
    assert code == 2 and error == "error: asked\n" and "are sent to" not in out


def test_help_states_what_the_endpoint_gets(script):
    _, out, _ = script(intentions.main, "--help")
    assert "it gets the users' histories and item texts" in " ".join(out.split())
