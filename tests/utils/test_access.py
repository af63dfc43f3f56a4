"""The demo page answers requests to its own names alone, from its own pages, and asks for a password if told to."""

import http.client

import pytest
from starlette.datastructures import Headers

from reclingua.utils.access import LOOPBACK, HostCheck, check_hosts, parse_auth
from reclingua.utils.errors import InputError


def refusal(host, origin=None, hosts=LOOPBACK):
    lines = [("host", host)] if host is not None else []
    return HostCheck(None, hosts).refusal(Headers({**dict(lines), **({"origin": origin} if origin else {})}))


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "127.0.0.1"])
def test_own_hosts_and_pages_are_answered(host):
    assert not refusal(host) and not refusal(host, f"http://{host}")


@pytest.mark.parametrize(
    "host",
    [None, "", "evil.example:7860", "127.0.0.1.evil.example", "evil.example@127.0.0.1", "127.0.0.1:x]", "[::1", "*"],
)
def test_other_hosts_are_refused(host):
    assert refusal(host) == "this host is not allowed"


@pytest.mark.parametrize(
    "origin", ["http://evil.example:7860", "null", "http://127.0.0.1:8000", "file://127.0.0.1:7860", "127.0.0.1:7860"]
)
def test_pages_of_other_origins_are_refused(origin):
    assert "not allowed" in refusal("127.0.0.1:7860", origin)


def test_hosts_of_the_user_are_allowed_with_their_pages():
    hosts = (*LOOPBACK, "hub.example")
    for host, origin in (("hub.example", "https://hub.example"), ("127.0.0.1:7860", "https://hub.example")):
        assert not refusal(host, origin, hosts)
    assert refusal("127.0.0.1:7860", "https://other.example", hosts)


def test_auth(tmp_path):
    assert parse_auth("me:a:b") == ("me", "a:b")
    (tmp_path / "auth").write_text("you:secret\n")
    assert parse_auth(str(tmp_path / "auth")) == ("you", "secret")
    for wrong in ("me", ":x", "me:", "a:b\nc"):
        with pytest.raises(InputError, match="USER:PASSWORD, or a file"):
            parse_auth(wrong)


@pytest.mark.slow  # Gradio takes seconds to import
def test_a_page_of_gradio_is_behind_the_checks(monkeypatch, tmp_path):
    from demo import free_port, set_environment

    monkeypatch.setattr("os.environ", {**__import__("os").environ})
    set_environment(str(tmp_path))
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as page:
        gr.Markdown("secret titles")
    port = free_port(None)
    lifespan = check_hosts(LOOPBACK)
    options = {"prevent_thread_lock": True, "quiet": True, "app_kwargs": {"lifespan": lifespan}, "share": False}
    page.launch(server_name="127.0.0.1", server_port=port, auth=("me", "pw"), **options)

    def ask(path, method="GET", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())

    try:
        own, evil = f"http://127.0.0.1:{port}", f"evil.example:{port}"
        assert ask("/")[0] == 200 and ask("/config")[0] == 401
        form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": own}
        status, _, headers = ask("/login", "POST", "username=me&password=pw", **form)
        cookie = {"Cookie": headers["set-cookie"].split(";")[0]}
        assert status == 200 and "secret titles" in ask("/config", **cookie)[1]
        assert ask("/login", "POST", "username=me&password=x", **form)[0] == 400
        for wrong in ({"Host": evil}, {"Host": evil, "Origin": f"http://{evil}"}, {"Origin": f"http://{evil}"}):
            for path, method in (("/config", "GET"), ("/", "GET"), ("/gradio_api/queue/join", "OPTIONS")):
                preflight = {"Access-Control-Request-Method": "POST"}
                status, text, headers = ask(path, method, **wrong, **cookie, **preflight)
                assert status == 403 and "not allowed" in text and "secret" not in text
                assert "access-control-allow-origin" not in {name.lower() for name in headers}
    finally:
        page.close(verbose=False)
