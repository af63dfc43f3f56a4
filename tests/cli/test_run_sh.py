"""run.sh: stages run in order, are skipped if nothing changed, and resume after an interruption."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.toys import write_preferences, write_toy

ROOT = Path(__file__).parents[2]
TINY = """
targets: all
per_device_batch_size: 4
learning_rate: 5.0e-3
max_steps: 40
save_and_eval_strategy: steps
save_steps: 20
"""


@pytest.fixture
def run(tmp_path):
    """run("--flag", ...): run run.sh in a copy of the repository; return the finished process with its output as text.

    terminal=True runs it in a terminal, with stderr in stdout; other keywords are environment variables.
    """
    if not (ROOT / ".venv").is_dir():
        pytest.skip("run.sh needs its .venv, which tests/run.sh makes")
    copy = tmp_path / "repository"
    ignored = shutil.ignore_patterns(".*", "ckpt", "results", "tests", "[0-9]*", "ml-100k")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    (copy / "tiny.yaml").write_text(TINY)

    def execute(*argv, terminal=False, **settings):
        environment = {"NO_COLOR": "", "TERM": "xterm", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **settings}
        command = ["bash", copy / "run.sh", *argv]
        if terminal:
            command = ["script", "-qec", shlex.join(map(str, command)), "/dev/null"]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=500)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()  # with its carriage returns
        return done

    execute.folder = copy
    return execute


def has_stages(done, *names):
    """Return whether these are the stages in the headings, from 1/n to n/n."""
    expected = [(str(number), str(len(names)), name) for number, name in enumerate(names, 1)]
    return re.findall(r"^(?:\x1b\[1m)?== (\d+)/(\d+) ([\w-]+)", done.stdout, re.MULTILINE) == expected


LCREC = ("embed", "rqvae", "index", "base", "finetune", "test")


def test_from_a_folder_to_results_and_again(run, tmp_path):
    write_toy(tmp_path / "mine", users=70, items=9)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine/toy").iterdir()}
    flags = ("toy", "--data_path", tmp_path / "mine", "--config", "tiny.yaml")
    first = run(*flags)
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((run.folder / "results/toy/lcrec.json").read_text())
    assert results["users"] == 70 and "all stages done" in first.stdout
    assert has_stages(first, *LCREC) and " left" not in first.stdout, first.stdout
    assert "\x1b" not in first.stdout + first.stderr and "\r" not in first.stdout + first.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine/toy").iterdir()} == before

    second = run(*flags, terminal=True)
    assert second.returncode == 0
    assert second.stdout.count("up to date, skipped") == 6, second.stdout
    assert has_stages(second, *LCREC) and second.stdout.count("\x1b[1m== ") == second.stdout.count("\x1b[0m") == 6

    # An interrupted fine-tuning: no stamp, a last checkpoint.
    stages = run.folder / "data/toy/.stages"
    (stages / "finetune").rename(stages / "finetune.running")
    (run.folder / "ckpt/toy/lcrec/model.safetensors").unlink()
    third = run(*flags)
    assert third.returncode == 0 and " from ckpt/toy/lcrec/checkpoint-40" in third.stdout
    assert third.stdout.count("up to date, skipped") >= 4
    assert re.search(r"== 5/6 finetune · \d min \d\d s elapsed$", third.stdout, re.MULTILINE)  # time left unknown

    # Bad input stops the run before anything changes: with the input repaired, all stages are up to date.
    path = tmp_path / "mine/toy/toy.item.json"
    texts = path.read_text()
    path.write_text("{}")
    broken = run(*flags)
    assert broken.returncode == 2 and "toy.item.json" in broken.stderr and "empty" in broken.stderr
    (run.folder / "tiny.yaml").write_text(TINY + "no_such_flag: 1\n")
    path.write_text(texts)
    broken = run(*flags)
    assert broken.returncode == 2 and "tiny.yaml" in broken.stderr and "'no_such_flag'" in broken.stderr
    (run.folder / "tiny.yaml").write_text(TINY)
    repaired = run(*flags, terminal=True, NO_COLOR="1")
    assert repaired.stdout.count("up to date, skipped") == 6, repaired.stdout + repaired.stderr
    assert has_stages(repaired, *LCREC) and "\x1b" not in repaired.stdout

    # Other data: all stages run again. The time left is that of the run before.
    write_toy(tmp_path / "mine", users=71, items=9)
    settings = {(stages / f"{name}.seconds").read_text().split()[1] for name in LCREC}
    assert len(settings) == 1
    for name, seconds in zip(LCREC, (20, 20, 10, 10, 600, 20), strict=True):
        (stages / f"{name}.seconds").write_text(f"{seconds} {min(settings)}\n")
    fourth = run(*flags, terminal=True, TERM="dumb")
    assert fourth.returncode == 0 and "skipped" not in fourth.stdout and "\x1b" not in fourth.stdout
    assert re.search(r"== 1/6 embed · 0 min \d\d s elapsed, about 11 min left", fourth.stdout), fourth.stdout
    heading = r"== \d/6 \w+ · \d+ min \d\d s elapsed, (about \d+ (s|min|h)|a few seconds) left"
    assert has_stages(fourth, *LCREC) and len(re.findall(heading, fourth.stdout)) == 6
    assert re.search("== 5/6 finetune .* about 10 min left", fourth.stdout)  # whatever the others took this time
    assert json.loads((run.folder / "results/toy/lcrec.json").read_text())["users"] == 71


def test_yes_or_no_from_ratings_to_results_and_again(run, workshop, tmp_path):
    write_preferences(tmp_path / "mine")
    flags = ("liked", "--method", "cora", "--data_path", tmp_path / "mine", "--base_model", workshop / "base")
    first = run(*flags)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("tallrec", "mf", "cora-mf"):
        results = json.loads((run.folder / f"results/liked/{name}.json").read_text())
        assert results["test"]["samples"] == 240
    assert "there is no GPU" in first.stdout and "the tuned model is ckpt/liked/cora-mf" in first.stdout
    assert has_stages(first, "tallrec", "test-tallrec", "pretrain-mf", "cora-mf", "test-cora-mf"), first.stdout
    second = run(*flags)
    assert second.returncode == 0 and second.stdout.count("up to date, skipped") == 5, second.stdout
    other = run("liked", "--method", "binllm", *flags[3:])
    assert other.returncode == 0 and other.stdout.count("up to date, skipped") == 2, other.stdout + other.stderr
    assert has_stages(other, "tallrec", "test-tallrec", "pretrain-hash", "binllm", "test-binllm")
    assert (run.folder / "results/liked/binllm.json").exists()


def test_number_of_stages_is_known_at_the_first(run, tmp_path):
    """The other kinds of run, to their first heading: a file of the user lies where its output should be."""
    folder = write_toy(tmp_path / "mine")
    (folder / "toy.item.json").unlink()
    time = r"0 min \d\d s elapsed"
    cases = {
        "": ("data/ml-100k/ml-100k.emb-minilm-td.npy", f"1/7 prepare · {time}, about 8 min left"),
        "--config tiny.yaml --force": ("data/ml-100k/ml-100k.emb-minilm-td.npy", f"1/7 prepare · {time}"),
        "--method collm --base_model x": ("ckpt/ml-100k/tallrec", f"1/6 prepare-preference · {time}"),
        "--method tallrec --base_model x": ("ckpt/ml-100k/tallrec", "1/3 prepare-preference: up to date, skipped"),
        f"toy --data_path {folder.parent}": ("ckpt/toy/base", f"1/4 index · {time}"),
    }
    for flags, (output, heading) in cases.items():
        (run.folder / output).mkdir(parents=True, exist_ok=True)
        done = run(*flags.split())
        assert done.returncode == 2 and f"{output}: was not made by run.sh" in done.stderr, done.stderr
        headings = re.findall("^== (.*)", done.stdout, re.MULTILINE)
        assert len(headings) == 1 and re.fullmatch(heading, headings[0]), headings


def test_bad_input(run, tmp_path):
    cases = {
        ("--what",): "--what is not an option",
        ("toy", "--data_path"): "--data_path needs a value",
        ("../toy",): "'../toy' is not a dataset name",
        ("toy", "--data_path", tmp_path): "toy.inter.json: no such file",
        ("toy", "--config", "no.yaml"): "no.yaml: no such preset",
        ("toy", "--method", "guess"): "--method guess: should be lcrec, tallrec",
        ("toy", "--method", "cora", "--cf_model", "hash"): "--cf_model hash: should be mf",
        ("toy", "--cf_model", "mf"): "--cf_model has no effect with --method lcrec",
        ("toy", "--method", "tallrec", "--base_model", "x"): "data/toy/train.parquet: no such file",
    }
    for argv, message in cases.items():
        done = run(*argv)
        assert done.returncode == 2 and message in done.stderr, (argv, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
    write_toy(run.folder / "data")  # the user's own folder with semantic IDs
    before = {path.name: path.read_bytes() for path in (run.folder / "data/toy").glob("*.json")}
    done = run("toy", "--config", "tiny.yaml")
    assert done.returncode == 2 and "toy.index.json: was not made by run.sh" in done.stderr
    assert {path.name: path.read_bytes() for path in (run.folder / "data/toy").glob("*.json")} == before
    broken = tmp_path / "mine/toy"
    broken.mkdir(parents=True)
    (broken / "toy.inter.json").write_text('{"0": [1,')
    (broken / "toy.item.json").write_text("{}")
    done = run("toy", "--data_path", tmp_path / "mine")
    assert done.returncode == 2 and "toy.inter.json" in done.stderr and "JSON" in done.stderr
