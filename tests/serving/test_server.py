"""Life of a server: overload, deadlines, clients that leave, reloads under load, shutdown, restart, bad flags."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

import serve
from reclingua import Recommender
from reclingua.utils.access import ADMIN_KEY, API_KEYS
from tests.helpers.scripts import ROOT
from tests.helpers.server import ADMIN, KEY, run_server, write_titles

pytestmark = pytest.mark.slow
BODY = {"history": [1, 2, 3], "k": 2}
SLOW = {"history": [1, 2], "items": [*range(1, 21)] * 10}
SINGLE = ("--max_batch", 1, "--max_wait_ms", 0)  # one request at a time


@pytest.fixture(scope="module")
def flags(checkpoints):
    return "--ckpt_path", checkpoints.lcrec, "--data_path", checkpoints.data, "--num_beams", 8


@pytest.fixture
def copied(checkpoints, tmp_path):
    """Flags for copies of the dataset and of the checkpoint, which a test can change, and the folder of both."""
    shutil.copytree(checkpoints.data / "toy", tmp_path / "data" / "toy")
    shutil.copytree(checkpoints.lcrec, tmp_path / "lcrec")
    return ("--ckpt_path", tmp_path / "lcrec", "--data_path", tmp_path / "data", "--num_beams", 8), tmp_path


# ---- Overload ----


def test_a_full_queue_answers_503(flags):
    with run_server(*flags, *SINGLE, "--max_queue", 2) as server:
        responses = server.post_all("/v1/recommend", [BODY] * 100, threads=50)
        codes = [response.status_code for response in responses]
        assert set(codes) == {200, 503} and codes.count(200) >= 3
        waits = {int(response.headers["Retry-After"]) for response in responses if response.status_code == 503}
        assert min(waits) >= 1 and max(waits) <= 5
        assert server.post("/v1/recommend", **BODY).status_code == 200
        assert server.metric('reclingua_requests_total{path="/v1/recommend",status="503"}') == codes.count(503)


def test_after_its_deadline_a_request_is_not_computed(checkpoints):
    """Each request takes a while, 200 rows of a Yes/No model; what waits beyond the deadline is dropped."""
    flags = ("--ckpt_path", checkpoints.tallrec, "--data_path", checkpoints.data)
    with run_server(*flags, *SINGLE, "--timeout", 0.5) as server:
        responses = server.post_all("/v1/score", [SLOW] * 30, threads=30)
        codes = [response.status_code for response in responses]
        assert set(codes) <= {200, 504} and codes.count(504) > 20
        assert "within 0.5 seconds" in next(entry.text for entry in responses if entry.status_code == 504)
        assert server.metric('reclingua_given_up_total{reason="deadline"}') == codes.count(504)
        assert server.metric("reclingua_queue_length") == 0
        time.sleep(0.5)  # until the last batch has ended
        assert server.metric("reclingua_batch_rows_count") <= codes.count(200) + 2


def test_a_client_that_left_is_not_computed_for(checkpoints):
    flags = ("--ckpt_path", checkpoints.tallrec, "--data_path", checkpoints.data)
    with run_server(*flags, *SINGLE, "--timeout", 60) as server:
        body = json.dumps(SLOW)
        request = f"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        request += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        sockets = [socket.create_connection(server.address) for _ in range(40)]
        for sock in sockets:
            sock.sendall(request.encode())
        while server.metric("reclingua_queue_length") < 30:
            time.sleep(0.01)
        for sock in sockets:
            sock.close()
        while server.metric("reclingua_queue_length"):
            time.sleep(0.01)
        assert server.metric('reclingua_given_up_total{reason="disconnect"}') >= 30
        assert server.post("/v1/score", history=[], items=[1]).status_code == 200  # after the batch that ran
        assert server.metric("reclingua_batch_rows_count") <= 11


def test_a_body_that_does_not_arrive_is_given_up(flags):
    with run_server(*flags, "--timeout", 0.5) as server:
        with socket.create_connection(server.address, timeout=10) as sock:
            sock.sendall(
                f"POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
                "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
            )
            answer = b"".join(iter(lambda: sock.recv(65536), b""))  # until the server closes the connection
        assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive in time" in answer


def test_a_failure_is_of_one_request_and_its_message_is_not_in_the_log(flags, monkeypatch):
    real = Recommender.recommend

    def recommend(self, histories, *args, **options):
        if ["8", "7"] in histories:
            raise KeyError("-".join(["sec", "ret"]).replace("-", ""))
        return real(self, histories, *args, **options)

    monkeypatch.setattr(Recommender, "recommend", recommend)
    with run_server(*flags, "--max_wait_ms", 300) as server:
        bodies = [{"history": history} for history in ([1], [8, 7], [2])]
        responses = server.post_all("/v1/recommend", bodies)
        assert [response.status_code for response in responses] == [200, 500, 200]
        assert "secret" not in responses[1].text + server.log.read_text()
        assert "/v1/recommend failed: KeyError" in server.log.read_text()
        assert server.metric('reclingua_requests_total{path="/v1/recommend",status="500"}') == 1


# ---- Reload ----


def test_reload_under_load(copied):
    """No request fails, and every answer is of one catalogue: its titles have one prefix, that of its version."""
    flags, root = copied
    items, prefixes, problems, answered = root / "data/toy/toy.item.json", {}, [], []
    write_titles(items, "first")
    with run_server(*flags) as server:
        done = threading.Event()

        def ask(_):
            with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
                while not done.is_set():
                    answer = client.post("/v1/recommend", json=BODY | {"k": 8})
                    if answer.status_code != 200:
                        problems.append(answer.text)
                        return
                    content = answer.json()
                    answered.append((content["catalogue"], *{e["title"].split()[0] for e in content["items"]}))

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(ask, number) for number in range(8)]
            prefixes[server.client.get("/v1/models").json()[0]["catalogue"]] = "first"
            for prefix in ("second", "third", "fourth", "fifth"):
                write_titles(items, prefix)
                response = server.reload()
                assert response.status_code == 200, response.text
                prefixes[response.json()["catalogues"]["lcrec"]] = prefix
                time.sleep(0.1)
            done.set()
            for result in running:
                result.result()
        assert not problems and {prefixes[version] for version, *_ in answered} == {*prefixes.values()}
        assert all(names == [prefixes[version]] for version, *names in answered)
        found = server.client.get("/v1/items", params={"query": "fifth", "limit": 100}).json()["items"]
        assert len(found) == 9 and "reloaded: lcrec" in server.log.read_text()


def test_a_failed_reload_keeps_the_old_catalogue(copied):
    flags, root = copied
    items = root / "data/toy/toy.item.json"
    with run_server(*flags) as server:
        before = server.post("/v1/recommend", **BODY).json()
        good = items.read_text()
        items.write_text(good[:-10])
        response = server.reload()
        assert response.status_code == 409 and "toy.item.json" in response.json()["detail"]
        assert "the old catalogues stay" in response.json()["detail"]
        assert server.post("/v1/recommend", **BODY).json() == before
        items.write_text(good)
        weights = root / "lcrec/model.safetensors"
        content = weights.read_bytes()
        weights.unlink()  # the old model reads that file as long as it is open
        weights.write_bytes(content[:1000])
        assert server.reload().status_code == 409
        assert server.post("/v1/recommend", **BODY).json() == before
        weights.unlink()
        weights.write_bytes(content)  # loaded anew, since the file has changed
        assert server.reload().status_code == 200
        assert server.post("/v1/recommend", **BODY).json() == before
        assert server.metric('reclingua_reloads_total{result="failed"}') == 2
        assert server.log.read_text().count("reload failed, the old catalogues stay: ") == 2


def test_sighup_reloads(copied):
    flags, root = copied
    with run_server(*flags, **{ADMIN_KEY: ""}) as server:
        assert server.reload().status_code == 403
        write_titles(root / "data/toy/toy.item.json", "new")
        os.kill(server.process.pid, signal.SIGHUP)
        for _ in range(100):
            items = server.post("/v1/recommend", **BODY).json()["items"]
            if items[0]["title"].startswith("new"):
                break
            time.sleep(0.05)
        assert all(entry["title"].startswith("new") for entry in items)


# ---- Shutdown and restart ----


def test_sigterm_finishes_what_was_accepted(flags):
    with run_server(*flags, *SINGLE) as server:
        with ThreadPoolExecutor(60) as pool:
            futures = [pool.submit(httpx2.post, f"{server.url}/v1/recommend", json=BODY, timeout=30,
                                   headers={"Authorization": f"Bearer {KEY}"}) for _ in range(60)]  # fmt: skip
            while server.metric("reclingua_queue_length") < 20:
                time.sleep(0.005)
            os.kill(server.process.pid, signal.SIGTERM)
            answers = []
            for future in futures:
                try:
                    answers.append(future.result().status_code)
                except httpx2.TransportError:  # came when it listened no more
                    answers.append(0)
        assert answers.count(200) >= 20 and set(answers) <= {200, 0}
        server.process.join(20)
        assert server.process.exitcode == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address)


def test_kill_and_restart_at_the_same_port(flags):
    """Started as a user starts it, killed with an open connection; the next one takes the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", *map(str, flags), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process, httpx2.Client() as client:
        assert any(line.startswith(f"{serve.URL_PREFIX}http://127.0.0.1:{port} ") for line in process.stdout)
        before = client.post(f"http://127.0.0.1:{port}/v1/recommend", json=BODY).json()
        process.kill()
        process.wait()
        with pytest.raises(httpx2.TransportError):
            client.get(f"http://127.0.0.1:{port}/health")
    with run_server(*flags, "--port", port) as server:
        assert server.post("/v1/recommend", **BODY).json() == before and len(before["items"]) == 2


# ---- Bad input ----


@pytest.mark.parametrize(
    "more, message",
    [
        (("--port", 70_000), "--port 70000: should be from 0 to 65535"),
        (("--max_batch", 0), "--max_batch 0: should be 1 at least"),
        (("--timeout", "nan"), "--timeout nan: should be more than 0 seconds"),
        (("--max_wait_ms", 20_000), "--max_wait_ms 20000: should be from 0 to --timeout"),
        (("--host", "0.0.0.0"), f"--host 0.0.0.0: others can reach it, so set {API_KEYS}"),
        (("--host", "203.0.113.1"), "set RECLINGUA_API_KEYS"),
        (("--host", "127.0.0.1.invalid."), "set RECLINGUA_API_KEYS"),
        (("--dataset", "nothing"), "no such dataset folder"),
    ],
)
def test_bad_flags(refused, monkeypatch, flags, more, message):
    monkeypatch.delenv(API_KEYS, raising=False)
    assert message in refused(serve.main, *flags, "--port", 0, *more)


def test_bad_addresses_keys_and_names(refused, monkeypatch, flags, checkpoints, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(serve.main, *flags, "--port", port)
        assert f"--port {port}: cannot be listened at (Address already in use); name another" in line
    monkeypatch.setenv(API_KEYS, KEY)
    assert "cannot be listened at" in refused(serve.main, *flags, "--host", "203.0.113.1", "--port", 0)
    for name, value in ((API_KEYS, f"{KEY}, short"), (ADMIN_KEY, "ä" * 20), (ADMIN_KEY, f"{ADMIN} x")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            line = refused(serve.main, *flags, "--port", 0)
            assert f"{name}: a key should have 16" in line and value not in line
    data = ("--data_path", checkpoints.data, "--port", 0)
    twice = refused(serve.main, "--ckpt_path", f"a={checkpoints.lcrec}", f"a={checkpoints.din}", *data)
    assert "two models are called 'a'" in twice
    assert "no such file" in refused(serve.main, "--ckpt_path", tmp_path, *data)
    assert "--bf16" in refused(serve.main, "--ckpt_path", checkpoints.din, *data, "--bf16")
