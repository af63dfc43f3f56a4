"""Set-ups of the tests of data.intentions."""

import pytest

from tests.helpers.chat_server import answer_from_prompt, run_server
from tests.helpers.intentions import endpoint_flags


@pytest.fixture
def fast_retries(monkeypatch):
    """Retries start at once, and no proxy of the environment is used."""
    from data import chat

    monkeypatch.setattr(chat, "INITIAL_BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def paths(toy, tmp_path):
    """Flags: the toy dataset, and an output in a folder of its own."""
    return "--dataset", "toy", "--data_path", toy, "--output", tmp_path / "out" / "toy.user.json"


@pytest.fixture
def expected_output(script, paths, toy, tmp_path):
    """Content of the output of a run without failures."""
    from data import intentions

    output = tmp_path / "expected_output" / "toy.user.json"
    with run_server(answer_from_prompt) as server:
        code, out, error = script(intentions.main, *paths[:-1], output, *endpoint_flags(server))
    assert code == 0, error
    return output.read_bytes()
