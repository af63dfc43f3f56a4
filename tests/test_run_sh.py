"""run.sh: stages follow one another, are skipped when nothing changed, and go on after an interruption."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import write_preferences, write_toy

ROOT = Path(__file__).parents[1]
TINY = """
supervise: history
per_device_batch_size: 4
learning_rate: 5.0e-3
max_steps: 40
save_and_eval_strategy: steps
save_steps: 20
"""


@pytest.fixture
def run(tmp_path):
    """run("--flag", ...): run.sh in a copy of the repository; returns the finished process."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("run.sh keeps its own .venv, which tests/run.sh makes")
    copy = tmp_path / "repository"
    left_out = shutil.ignore_patterns(".*", "ckpt", "results", "tests", "[0-9]*", "ml-100k")
    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    (copy / "tiny.yaml").write_text(TINY)

    def execute(*argv):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            ["bash", copy / "run.sh", *map(str, argv)], capture_output=True, text=True, env=environment, timeout=500
        )

    execute.folder = copy
    return execute


def test_from_a_folder_to_results_and_again(run, tmp_path):
    write_toy(tmp_path / "mine", users=70, items=9)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine/toy").iterdir()}
    flags = ("toy", "--data_path", tmp_path / "mine", "--config", "tiny.yaml")
    first = run(*flags)
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((run.folder / "results/toy/lcrec.json").read_text())
    assert results["users"] == 70 and "all stages done" in first.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine/toy").iterdir()} == before

    second = run(*flags)
    assert second.returncode == 0
    assert second.stdout.count("done before, skipped") == 6, second.stdout

    # An interrupted fine-tuning: no stamp, a last checkpoint.
    stages = run.folder / "data/toy/.stages"
    (stages / "finetune").rename(stages / "finetune.running")
    (run.folder / "ckpt/toy/lcrec/model.safetensors").unlink()
    third = run(*flags)
    assert third.returncode == 0 and "going on from ckpt/toy/lcrec/checkpoint-40" in third.stdout
    assert third.stdout.count("done before, skipped") >= 4

    # Bad input stops the run and costs nothing: with the input repaired, all is as it was.
    path = tmp_path / "mine/toy/toy.item.json"
    texts = path.read_text()
    path.write_text("{}")
    broken = run(*flags)
    assert broken.returncode == 2 and "toy.item.json: is empty" in broken.stderr
    (run.folder / "tiny.yaml").write_text(TINY + "no_such_flag: 1\n")
    path.write_text(texts)
    broken = run(*flags)
    assert broken.returncode == 2 and "'no_such_flag' is not a flag" in broken.stderr
    (run.folder / "tiny.yaml").write_text(TINY)
    repaired = run(*flags)
    assert repaired.stdout.count("done before, skipped") == 6, repaired.stdout + repaired.stderr

    # Other data: everything that comes from it is made again.
    write_toy(tmp_path / "mine", users=71, items=9)
    fourth = run(*flags)
    assert fourth.returncode == 0 and "skipped" not in fourth.stdout
    assert json.loads((run.folder / "results/toy/lcrec.json").read_text())["users"] == 71


def test_yes_or_no_from_ratings_to_results_and_again(run, workshop, tmp_path):
    write_preferences(tmp_path / "mine")
    flags = ("liked", "--method", "cora", "--data_path", tmp_path / "mine", "--base_model", workshop / "base")
    first = run(*flags)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("tallrec", "mf", "cora-mf"):
        results = json.loads((run.folder / f"results/liked/{name}.json").read_text())
        assert results["test"]["samples"] == 240
    assert (
        "a sample of the rows: there is no GPU" in first.stdout
        and "the tuned model is ckpt/liked/cora-mf" in first.stdout
    )
    second = run(*flags)
    assert second.returncode == 0 and second.stdout.count("done before, skipped") == 5, second.stdout
    other = run("liked", "--method", "binllm", *flags[3:])
    assert other.returncode == 0 and other.stdout.count("done before, skipped") == 2, other.stdout + other.stderr
    assert (run.folder / "results/liked/binllm.json").exists()


def test_bad_input_of_run_sh(run, tmp_path):
    cases = {
        ("--what",): "--what is not an option",
        ("toy", "--data_path"): "--data_path needs a value",
        ("../toy",): "'../toy' is not a dataset name",
        ("toy", "--data_path", tmp_path): "toy.inter.json: no such file",
        ("toy", "--config", "no.yaml"): "no.yaml: no such preset",
        ("toy", "--method", "guess"): "--method guess: should be lcrec, tallrec",
        ("toy", "--method", "cora", "--collab", "hash"): "--collab hash: should be mf",
        ("toy", "--collab", "mf"): "--collab means nothing with --method lcrec",
        ("toy", "--method", "tallrec", "--base_model", "x"): "data/toy/train.parquet: no such file",
    }
    for argv, message in cases.items():
        done = run(*argv)
        assert done.returncode == 2 and message in done.stderr, (argv, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
    write_toy(run.folder / "data")  # a folder of the user's own, with an index of the user's own
    before = {path.name: path.read_bytes() for path in (run.folder / "data/toy").glob("*.json")}
    done = run("toy", "--config", "tiny.yaml")
    assert done.returncode == 2 and "toy.index.json: is there, but run.sh did not make it" in done.stderr
    assert {path.name: path.read_bytes() for path in (run.folder / "data/toy").glob("*.json")} == before
    broken = tmp_path / "mine/toy"
    broken.mkdir(parents=True)
    (broken / "toy.inter.json").write_text('{"0": [1,')
    (broken / "toy.item.json").write_text("{}")
    done = run("toy", "--data_path", tmp_path / "mine")
    assert done.returncode == 2 and "toy.inter.json: not valid JSON" in done.stderr
