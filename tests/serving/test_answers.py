"""Answers of a running server: equal to those of Recommender and Scorer, one clear error for everything else."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import demo
from reclingua import Recommender, Scorer
from reclingua.demo.next_item import NextItem
from reclingua.demo.remote import RemoteRecommender
from reclingua.inference.fusion import load_fusion
from reclingua.inference.user_lists import most_popular
from reclingua.utils.errors import InputError
from tests.helpers.server import ADMIN, KEY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recommender(checkpoints):
    return Recommender.from_pretrained(checkpoints.lcrec, checkpoints.data)


def assert_same_list(response, expected):
    """The items of an answer are those of a list of ScoredItem, with the same scores and their titles."""
    assert response.status_code == 200, response.text
    items = response.json()["items"]
    assert [entry["item"] for entry in items] == [entry.item for entry in expected]
    assert [entry["score"] for entry in items] == pytest.approx([entry.score for entry in expected], abs=1e-4)
    assert all(entry["title"] == f"Toy number {entry['item']}" for entry in items)


# ---- Lists and scores ----


def test_concurrent_requests_get_the_lists_of_recommender(server, recommender):
    histories = list(recommender.dataset.histories.values())
    rows = [number % 3 for number in range(len(histories))]
    options = [{"exclude_seen": True}, {"exclude": ["4", 5]}, {"candidates": [1, "2", 3, 8], "k": 3}]
    others = [[], ["4", "5"], [item for item in recommender.dataset.index if item not in ("1", "2", "3", "8")]]
    excluded = [others[row] + (history if row == 0 else []) for row, history in zip(rows, histories, strict=True)]
    expected = recommender.recommend(histories, 8, excluded=excluded, num_beams=8)
    before = server.metric("reclingua_batch_rows_count"), server.metric("reclingua_batch_rows_sum")
    bodies = [{"history": history, "k": 8} | options[row] for row, history in zip(rows, histories, strict=True)]
    for response, ranked, body in zip(server.post_all("/v1/recommend", bodies), expected, bodies, strict=True):
        assert_same_list(response, ranked[: body["k"]])
        assert response.json()["source"] == "model" and response.json()["ignored"] == {}
    batches = server.metric("reclingua_batch_rows_count") - before[0]
    assert server.metric("reclingua_batch_rows_sum") - before[1] == len(bodies) > 2 * batches


def test_fused_lists(server, recommender, checkpoints):
    fused = load_fusion(checkpoints.lcrec, recommender)
    history = recommender.dataset.histories["5"][:4]
    (expected,) = fused.recommend([history], 4, exclude_seen=True)
    asked = {"history": history, "fuse": True, "exclude_seen": True}
    assert_same_list(server.post("/v1/recommend", k=4, **asked), expected)
    rest = server.post("/v1/recommend", k=8, exclude=[expected[0].item], **asked).json()["items"]
    assert expected[0].item not in {entry["item"] for entry in rest} and rest[0]["item"] == expected[1].item
    (few,) = fused.recommend([history], 8, exclude_seen=True, excluded=[[expected[0].item]])
    assert [entry["item"] for entry in rest] == [entry.item for entry in few]


def test_scores_of_a_next_item_model(server, recommender):
    items = ["3", "4", "3", "7"]
    (expected,) = recommender.score([["1", "2"]], [items])
    answer = server.post("/v1/score", history=[1, 2], items=items).json()
    assert [entry["item"] for entry in answer["scores"]] == items
    assert [entry["score"] for entry in answer["scores"]] == pytest.approx(expected.tolist(), abs=1e-4)
    assert {entry["probability"] for entry in answer["scores"]} == {None} and answer["source"] == "model"


@pytest.mark.parametrize("name, folder", [("likes", "tallrec"), ("din", "din")])
def test_scores_of_models_of_ratings(server, checkpoints, name, folder):
    scorer = Scorer.from_pretrained(getattr(checkpoints, folder), checkpoints.data)
    history, items = ["3", "5"], ["1", "2", "9"]
    for user in ("7", None):
        expected = scorer.score([history] * 3, items, [user] * 3)
        asked = {"user": user} if user else {}
        answer = server.post("/v1/score", model=name, history=history, items=items, **asked).json()
        assert [entry["score"] for entry in answer["scores"]] == pytest.approx(expected.tolist(), abs=1e-4)
        probabilities = [entry["probability"] for entry in answer["scores"]]
        assert probabilities == pytest.approx(scorer.probabilities(expected).tolist(), abs=1e-4)
    empty = server.post("/v1/score", model=name, history=[], items=[1, "nothing"], user="strange").json()
    assert len(empty["scores"]) == 1 and empty["ignored"] == {"items": ["nothing"], "user": ["strange"]}


def test_without_a_known_item_the_popular_ones(server, recommender):
    popular = most_popular(recommender.dataset, recommender.token_ids)
    response = server.post("/v1/recommend", history=["new", "99", "new"], k=3)
    assert_same_list(response, popular[:3])
    assert response.json()["source"] == "popularity" and response.json()["ignored"] == {"history": ["new", "99"]}
    few = server.post("/v1/recommend", history=[], candidates=[1, 2, 77], exclude=[2, "x"])
    assert_same_list(few, [entry for entry in popular if entry.item == "1"])
    assert few.json()["ignored"] == {"exclude": ["x"], "candidates": ["77"]}
    scores = server.post("/v1/score", history=["new"], items=["1", "2"]).json()
    counts = {entry.item: entry.score for entry in popular}
    assert scores["source"] == "popularity"
    assert [entry["score"] for entry in scores["scores"]] == [counts["1"], counts["2"]]


def test_the_known_items_of_a_history_are_read(server, recommender):
    (expected,) = recommender.recommend([["1", "2"]], 3, num_beams=8)
    response = server.post("/v1/recommend", history=["new", 1, "\x00", 2, 10**30], k=3)
    assert_same_list(response, expected)
    assert response.json()["ignored"] == {"history": ["new", "\x00", str(10**30)]}
    nothing = server.post("/v1/recommend", history=[1], candidates=["unknown"])
    assert nothing.status_code == 200 and nothing.json()["items"] == []


def test_the_demo_asks_the_server(server, recommender, checkpoints, refused):
    remote = NextItem(RemoteRecommender(server.url, checkpoints.data, KEY), 8)
    local = NextItem(recommender, 8)
    assert (remote.name, remote.max_his_len, remote.recommenders[1:]) == ("lcrec", 3, local.recommenders[1:])
    for name in remote.recommenders:
        answers = [model.ask(name, ["1", "2", "3"], 5, exclude_seen=True, taken="4") for model in (remote, local)]
        assert answers[0]._replace(seconds=0) == answers[1]._replace(seconds=0)
    with pytest.raises(InputError, match="answers 401"):
        RemoteRecommender(server.url, checkpoints.data, "wrong")
    for url, message in (("http://127.0.0.1:1", "cannot be asked"), ("nonsense", "cannot be asked")):
        assert message in refused(demo.main, "--server", url, "--data_path", checkpoints.data)
    assert "give one of them" in refused(demo.main)


# ---- Catalogue and state ----


def test_catalogue_and_state(server):
    found = server.client.get("/v1/items", params={"query": "number 3"}).json()
    assert found["items"] == [{"item": "3", "title": "Toy number 3"}] and found["model"] == "lcrec"
    assert len(server.client.get("/v1/items", params={"model": "likes", "limit": 4}).json()["items"]) == 4
    models = {model["name"]: model for model in server.client.get("/v1/models").json()}
    assert models["lcrec"] | {"catalogue": ""} == {
        "name": "lcrec", "kind": "next-item", "dataset": "toy", "catalogue": "", "items": 9, "max_k": 8,
        "max_his_len": 3, "fusions": [True],
    }  # fmt: skip
    assert models["likes"]["kind"] == "rating" and models["din"]["items"] == 30
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"status": "ready"}
    assert 'reclingua_requests_total{path="/v1/models",status="200"}' in server.client.get("/metrics").text
    assert {"/v1/recommend", "/v1/score", "/v1/items"} <= server.client.get("/openapi.json").json()["paths"].keys()


# ---- What is refused ----

GOOD = {"history": [1]}
INVALID = [
    ("/v1/recommend", {}, "history"),
    ("/v1/recommend", {"history": "1"}, "history"),
    ("/v1/recommend", {"history": [1, 2.5]}, "history.1"),
    ("/v1/recommend", {"history": [True]}, "history.0"),
    ("/v1/recommend", {"history": [""]}, "history.0"),
    ("/v1/recommend", {"history": [[1]]}, "history.0"),
    ("/v1/recommend", {"history": ["x" * 1001]}, "history.0"),
    ("/v1/recommend", {"history": ["\ud83d"]}, "history.0"),
    ("/v1/recommend", {"history": [1] * 10_000}, "history"),
    ("/v1/recommend", {"history": [None] * 9_999}, "history.0"),
    ("/v1/recommend", GOOD | {"k": 0}, "k"),
    ("/v1/recommend", GOOD | {"k": 9}, "k"),
    ("/v1/recommend", GOOD | {"k": "3"}, "k"),
    ("/v1/recommend", GOOD | {"exclude_seen": 1}, "exclude_seen"),
    ("/v1/recommend", GOOD | {"fuse": True}, "fuse"),
    ("/v1/recommend", GOOD | {"candidates": {}}, "candidates"),
    ("/v1/recommend", GOOD | {"model": "din"}, "model"),
    ("/v1/recommend", GOOD | {"K" * 5000: 1}, "K" * 100),
    ("/v1/recommend", GOOD | {"\ud83d": 1}, ""),
    ("/v1/score", GOOD, "items"),
    ("/v1/score", GOOD | {"items": []}, "items"),
    ("/v1/score", GOOD | {"items": [1] * 1001}, "items"),
    ("/v1/score", GOOD | {"items": [1], "model": "nothing"}, "model"),
]


@pytest.mark.parametrize("path, body, field", INVALID, ids=[f"{number}" for number in range(len(INVALID))])
def test_invalid_requests_name_the_field(server, path, body, field):
    response = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and len(response.content) < 2000, response.text
    assert ".".join(map(str, response.json()["detail"][0]["loc"])) == f"body.{field}".rstrip(".")


@pytest.mark.parametrize(
    "content, status",
    [
        (b'{"history": [NaN]}', 422),
        (b'{"history": [1]', 422),
        (b'{"history": ' + b"[" * 100_000, (400, 422)),
        (b'{"history": [' + b"9" * 5000 + b"]}", (400, 422)),
        (b"\xff\xfe\x00", (400, 422)),
        (b"", 422),
        (b"[]", 422),
        (b" " * (2**20 + 1), 413),
    ],
    ids=["nan", "torn", "deep", "digits", "bytes", "empty", "list", "large"],
)
def test_invalid_bodies(server, content, status):
    response = server.client.post("/v1/recommend", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (status if isinstance(status, tuple) else (status,)), response.text
    assert server.client.get("/health").status_code == 200


def test_wrong_keys(server):
    for header in ("", "Bearer", "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {ADMIN}"):
        response = server.client.get("/v1/models", headers={"Authorization": header})
        assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
    assert server.client.post("/v1/admin/reload").status_code == 401
    for path in ("/health", "/ready", "/metrics"):
        assert server.client.get(path, headers={"Authorization": ""}).status_code == 200


def test_other_hosts_and_pages_are_refused(server):
    for header in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        response = server.client.get("/v1/models", headers=header)
        assert response.status_code == 403 and "not allowed" in response.text


# ---- Load ----


def test_200_connections_at_once(server):
    def ask(sock):
        body = json.dumps({"history": [1, 2], "k": 2}).encode()
        head = f"POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        with sock:
            sock.sendall(head.encode() + body)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    sockets = [socket.create_connection(server.address, timeout=30) for _ in range(200)]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, sockets))
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    contents = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    assert len({tuple(entry["item"] for entry in content["items"]) for content in contents}) == 1


def test_slow_clients_hold_nobody_up(server):
    slow = [socket.create_connection(server.address, timeout=30) for _ in range(50)]
    for number, sock in enumerate(slow):
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 20\r\n\r\n{"
        sock.sendall(head[: 10 if number % 2 else None])
    started = time.monotonic()
    assert server.post("/v1/recommend", history=[1]).status_code == 200
    assert time.monotonic() - started < 2
    for sock in slow:
        sock.close()
    assert server.post("/v1/recommend", history=[1]).status_code == 200


def test_nothing_of_a_history_is_in_the_log(server):
    assert server.post("/v1/recommend", history=["secret-item", 2**70]).status_code == 200
    assert server.client.get("/v1/items", params={"query": "secret-query"}).status_code == 200
    assert "secret" not in server.log.read_text() and "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_requests_made_from_the_openapi_document(server, mode):
    """Requests that the document allows are answered as it states, others are refused as it states."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is missing: requirements-dev.txt")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.exclude(path="/v1/admin/reload").get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
        has_input = operation.body or operation.query
        if mode == "negative" and not has_input:
            continue

        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        @settings(
            max_examples=30 if has_input else 2, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case):
            if mode == "positive":  # within what this server has, which the document does not state
                for fields in (part for part in (case.body, case.query) if isinstance(part, dict)):
                    fields |= {"k": min(fields["k"], 8)} if "k" in fields else {}
                    fields |= {"fuse": False} if "fuse" in fields else {}
                    fields.pop("model", None)
            case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"})

        check()
