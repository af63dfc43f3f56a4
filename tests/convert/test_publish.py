"""Model cards, and uploads to a hub, which a small server simulates."""

import base64
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest import mock

import pytest
import torch
import yaml
from huggingface_hub import constants

import finetune
import test as test_script
from convert import make_delta, merge_delta, publish
from convert.folders import public_name
from tests.helpers.scripts import flags, run_main, second
from tests.helpers.weights import run_make_delta, write_model

TOKEN = "hf_secretsecretsecret"
ROOT = Path(__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """Handler of the four endpoints that an upload of small files needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        code, answer = 200, {}
        if self.server.refuses:
            code, answer = 403, {"error": "You do not have the rights"}
        elif self.path == "/api/repos/create":
            answer = {"url": f"{self.server.url}/me/games", "id": "me/games"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.server.url}/me/games/commit/1", "commitOid": "1", "success": True}
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@contextmanager
def hub(refuses=False):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.refuses, server.requests, server.files = (
        f"http://127.0.0.1:{server.server_port}",
        refuses,
        [],
        {},
    )
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def two(tmp_path):
    weights = {"model.a.weight": torch.randn(20, 30)}
    base = write_model(tmp_path / "base", weights)
    target = write_model(tmp_path / "target", {name: 1.1 * weight for name, weight in weights.items()})
    (target / "reclingua.json").write_text(
        json.dumps({"method": "lcrec", "dataset": "Games", "base_model": str(base), "lora": None})
    )
    return base, target


@pytest.mark.slow
def test_a_delta_goes_to_the_hub(two, tmp_path):
    """A separate process finds the hub by HF_ENDPOINT."""
    base, target = two
    paths = ("--base-model-path", base, "--target-model-path", target, "--delta-path", tmp_path / "delta")
    command = [sys.executable, "-m", "convert.make_delta", *paths, "--push_to_hub", "me/games"]
    with hub() as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    files = {file.name: file.read_bytes() for file in (tmp_path / "delta").iterdir()}
    assert server.files == files and {"README.md", "model.safetensors", "delta.json", "reclingua.json"} <= set(files)
    assert {key for path, key in server.requests if "create" in path or "commit" in path} == {f"Bearer {TOKEN}"}
    assert f"{tmp_path / 'delta'} -> {server.url}/me/games" in done.stdout
    assert TOKEN not in done.stdout + done.stderr and not any(TOKEN.encode() in content for content in files.values())


@pytest.mark.parametrize("failure", ["forbidden", "unreachable", "offline"])
def test_a_failed_upload_keeps_the_folder(two, tmp_path, refused, monkeypatch, failure):
    base, target = two
    paths = ("--base-model-path", base, "--target-model-path", target, "--delta-path", tmp_path / "delta")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub(refuses=True) as server:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9" if failure == "unreachable" else server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", failure == "offline")
        message = refused(make_delta.main, *paths, "--push_to_hub", "me/games")
    assert "error: me/games: upload to the hub failed" in message and TOKEN not in message
    assert f"hf upload me/games {tmp_path / 'delta'}" in message
    assert (tmp_path / "delta" / "model.safetensors").exists() and not server.files
    assert bool(server.requests) == (failure == "forbidden")


def test_no_upload_without_a_name_and_a_token(two, tmp_path, refused, monkeypatch):
    base, target = two
    paths = ("--base-model-path", base, "--target-model-path", target, "--delta-path", tmp_path / "delta")
    monkeypatch.setattr("convert.model_card.get_token", lambda: None)
    assert "needs a token: hf auth login" in refused(make_delta.main, *paths, "--hub-repo-id", "me/games")
    assert "is no valid repository name" in refused(make_delta.main, *paths, "--push_to_hub", "me/ga mes/")
    assert not (tmp_path / "delta").exists()


def card_of(folder):
    _, about, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(about), text


def test_the_card(two, script, tmp_path, monkeypatch):
    """Metrics come from the results of the same model, or from --results_file."""
    base, target = two
    run_make_delta(script, base, target, tmp_path / "bare")
    about, text = card_of(tmp_path / "bare")
    assert about["base_model"] == "base" and about["library_name"] == "transformers"
    assert about["tags"] == ["recommendation", "reclingua", "lcrec", "delta-weights"]
    assert "python -m convert.merge_delta --base-model-path" in text and "--dataset Games" in text
    assert "Games.index.json" in text and "model-index" not in about

    results = tmp_path / "results" / "Games" / "lcrec.json"
    results.parent.mkdir(parents=True)
    content = {"mean_results": {"hit@10": 0.25, "ndcg@10": 0.125}, "arguments": {"ckpt_path": str(tmp_path / "other")}}
    results.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    run_make_delta(script, base, target, tmp_path / "others")
    assert "model-index" not in card_of(tmp_path / "others")[0]
    results.write_text(json.dumps(content | {"arguments": {"ckpt_path": "target"}}))
    run_make_delta(script, base, target, tmp_path / "its-own")
    about, text = card_of(tmp_path / "its-own")
    measured = about["model-index"][0]["results"][0]
    assert measured["dataset"]["name"] == "Games"
    assert {metric["type"]: metric["value"] for metric in measured["metrics"]} == content["mean_results"]
    assert "| hit@10 | 0.2500 |" in text

    named = tmp_path / "preferences.json"
    named.write_text(json.dumps({"test": {"auc": 0.7, "uauc": None, "samples": 9}}))
    paths = ("--base-model-path", base, "--delta-path", tmp_path / "bare", "--target-model-path", tmp_path / "merged")
    code, _, error = script(merge_delta.main, *paths, "--results_file", named)
    assert code == 0, error
    about, text = card_of(tmp_path / "merged")
    assert "| auc | 0.7000 |" in text and "merge_delta" not in text
    assert about["tags"] == ["recommendation", "reclingua", "lcrec"]


@pytest.mark.parametrize(
    "content, message",
    [({"users": 3}, "should be results of test.py"), ({"test": {"auc": "x"}}, "auc should be a number")],
)
def test_invalid_results_files(two, refused, tmp_path, content, message):
    base, target = two
    (tmp_path / "r.json").write_text(json.dumps(content))
    paths = ("--base-model-path", base, "--target-model-path", target, "--delta-path", tmp_path / "delta")
    assert message in refused(make_delta.main, *paths, "--results_file", tmp_path / "r.json")
    assert "no such file" in refused(make_delta.main, *paths, "--results_file", tmp_path / "none.json")
    assert not (tmp_path / "delta").exists()


def test_public_names():
    assert public_name("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0f1e") == "Qwen/Qwen3-0.6B"
    assert public_name("/home/me/llama-7b/") == "llama-7b"
    assert public_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


# ---- convert.publish ----


def read_texts(folder):
    """Return the contents of all files of a folder but its weights and its tokenizer."""
    names = {file.name for file in folder.iterdir()} - {"tokenizer.json"}
    return {name: (folder / name).read_text() for name in names if not name.endswith(".safetensors")}


@pytest.mark.parametrize("lora", [(), ("--lora",)])
@pytest.mark.slow
def test_a_published_checkpoint_has_no_paths_and_the_same_predictions(workshop, tmp_path, script, lora, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ("--max_steps", 2, "--save_and_eval_strategy", "no", *lora)
    run_main(finetune.main, *flags(workshop, tmp_path / "lcrec", *few))
    code, out, error = script(publish.main, "--ckpt_path", "lcrec", "--output_dir", "shared/games")
    assert code == 0, error
    files = read_texts(tmp_path / "shared/games")
    assert not [name for name, text in files.items() if str(workshop) in text or str(tmp_path) in text]
    assert {"index.json", "items.json", "reclingua.json", "README.md"} <= files.keys()
    assert not {"_training_histories.json", "run.json"} & files.keys()
    assert "`index.json` has the semantic ID of each item, `items.json` their titles" in files["README.md"]
    assert ("These are the weights that were trained on top of `base`" in files["README.md"]) == bool(lora)
    base = ("--base_model", workshop / "base") if lora else ()
    predicted = []
    for folder in ("lcrec", "shared/games"):
        where = ("--ckpt_path", folder, "--data_path", workshop / "datasets", "--results_file", "results.json")
        short = ("--predictions_file", "lines.jsonl", "--num_beams", 5, "--metrics", "hit@1", "--sample_num", 9)
        with mock.patch.object(test_script, "write_report"):
            assert script(test_script.main, *where, *short, *base)[0] == 0
        predicted.append((tmp_path / "lines.jsonl").read_text())
    assert predicted[0] == predicted[1]


@pytest.mark.slow
def test_a_published_yes_no_model_names_what_it_needs(studio, tmp_path, script):
    few = ("--max_steps", 1, "--save_strategy", "no")
    assert script(finetune.main, *second(studio, "collm", tmp_path / "collm", *few))[0] == 0
    for ckpt, output in ((tmp_path / "collm", "public"), (studio / "mf", "mf")):
        code, _, error = script(publish.main, "--ckpt_path", ckpt, "--output_dir", tmp_path / output)
        assert code == 0, error
        assert not [name for name, text in read_texts(tmp_path / output).items() if str(studio) in text]
    about, text = card_of(tmp_path / "public")
    assert "on top of `base`" in text and "collaborative model `mf`" in text and about["base_model"] == "base"
    assert "collaborative model of ratings" in card_of(tmp_path / "mf")[1]


def test_bad_input_of_publish(two, tmp_path, refused):
    _, target = two
    (target / "model.safetensors").unlink()
    where = ("--output_dir", tmp_path / "out")
    assert "contains no weights as safetensors" in refused(publish.main, "--ckpt_path", target, *where)
    assert "no such folder" in refused(publish.main, "--ckpt_path", tmp_path / "none", *where)
    assert not (tmp_path / "out").exists()
