"""run.sh: stages run in order, are skipped if nothing changed, and resume after an interruption.

A stub in the place of .venv's python writes what a stage would write. tests/docs/test_readme.py runs the real stages.
"""

import fcntl
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.helpers.scripts import ROOT, copy_repository
from tests.helpers.toys import write_preferences, write_toy

STUB = r"""#!/usr/bin/env bash
# Write the outputs of a stage, other ones each time; `fails` holds lines "command exit-code".
command=$1 all=$*; [[ $1 != -m ]] || command=$2
echo "$command" >>calls
while read -r name code; do
  [[ $name != "$command" ]] || { echo "error: $name" >&2; exit "$code"; }
done < <(cat fails 2>/dev/null)
while [[ $# -gt 0 ]]; do
  case $1 in
    --output | --results_file) mkdir -p "$(dirname "$2")"; echo "$command $RANDOM $RANDOM" >"$2" ;;
    --output_dir)
      [[ ! -d $2/checkpoint-40 ]] || echo "resuming from $2/checkpoint-40"
      mkdir -p "$2/checkpoint-40"
      [[ ! -e interrupt ]] || exit 130
      [[ -e sigterm ]] || echo "$command $RANDOM $RANDOM" >"$2/run.json" ;;
  esac
  shift
done
cd data/ml-100k 2>/dev/null || exit 0
case $all in
  *data.prepare*preference*) touch {train,valid,test}.parquet item.json ;;
  *data.prepare*) touch ml-100k.{inter,item}.json ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """run("--flag", ...): run run.sh in a copy of the repository; return the finished process with its output as text.

    terminal=True runs it in a terminal, with stderr in stdout; other keywords are environment variables.
    """
    if not (ROOT / ".venv/requirements.sha256").exists():
        pytest.skip("run.sh needs its .venv, which tests/run.sh makes")
    copy = copy_repository(tmp_path / "repository")
    (copy / "tiny.yaml").write_text("targets: all\n")
    (copy / ".venv/bin").mkdir()
    (copy / ".venv/bin/python").write_text(STUB)
    (copy / ".venv/bin/python").chmod(0o755)

    def execute(*argv, terminal=False, **settings):
        environment = {"NO_COLOR": "", "TERM": "xterm", **settings}
        command = ["bash", copy / "run.sh", *argv]
        if terminal:
            command = ["script", "-qec", shlex.join(map(str, command)), "/dev/null"]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=100)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()  # with its carriage returns
        return done

    execute.folder = copy
    return execute


def has_stages(done, *names):
    """Return whether these are the stages in the headings, from 1/n to n/n."""
    expected = [(str(number), str(len(names)), name) for number, name in enumerate(names, 1)]
    return re.findall(r"^(?:\x1b\[1m)?== (\d+)/(\d+) ([\w-]+)", done.stdout, re.MULTILINE) == expected


LCREC = ("embed", "rqvae", "index", "base", "finetune", "test")
NO_GPU = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="the presets are those of a machine without a GPU")


@NO_GPU
def test_stages_run_once_and_resume(run, tmp_path):
    write_toy(tmp_path / "mine", users=70, items=9)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine/toy").iterdir()}
    flags = ("toy", "--data_path", tmp_path / "mine", "--config", "tiny.yaml")
    first = run(*flags)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (run.folder / "results/toy/lcrec.json").exists() and "all stages done" in first.stdout
    assert has_stages(first, *LCREC) and " left" not in first.stdout, first.stdout
    assert "\x1b" not in first.stdout + first.stderr and "\r" not in first.stdout + first.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine/toy").iterdir()} == before

    second = run(*flags, terminal=True)
    assert second.returncode == 0
    assert second.stdout.count("up to date, skipped") == 6, second.stdout
    assert has_stages(second, *LCREC) and second.stdout.count("\x1b[1m== ") == second.stdout.count("\x1b[0m") == 6


@NO_GPU
def test_a_finished_model_stays_until_the_next_is_finished(run, tmp_path):
    write_toy(tmp_path / "mine", users=70, items=9)
    flags = ("toy", "--data_path", tmp_path / "mine", "--config", "tiny.yaml")
    preset, model = run.folder / "tiny.yaml", run.folder / "ckpt/toy/lcrec"
    assert run(*flags).returncode == 0
    finished = (model / "run.json").read_text()

    def unfinished():
        return sorted(path.name for path in model.parent.glob("lcrec.*"))

    # SIGTERM: finetune.py exits with 0 before it has written run.json; run.sh ends with the code of a SIGTERM.
    preset.write_text("targets: last\n")
    (run.folder / "sigterm").touch()
    ended = run(*flags)
    assert ended.returncode == 143 and "stage finetune failed" in ended.stdout
    assert "made again, since tiny.yaml changed" in ended.stdout
    (run.folder / "sigterm").unlink()
    (first,) = unfinished()

    # Other settings, and Ctrl-C: the work of both is kept, and the finished model, which has its stamp.
    preset.write_text("targets: last\nepochs: 2\n")
    (run.folder / "interrupt").touch()
    assert run(*flags).returncode == 130
    (run.folder / "interrupt").unlink()
    assert (model / "run.json").read_text() == finished and first in unfinished() and len(unfinished()) == 2
    preset.write_text("targets: all\n")
    assert run(*flags).stdout.count("up to date, skipped") == 6

    # The settings of the first interrupted run again: it resumes, and takes the place of the finished model.
    preset.write_text("targets: last\n")
    resumed = run(*flags)
    assert resumed.returncode == 0 and f"resuming from ckpt/toy/{first}/checkpoint-40" in resumed.stdout
    assert re.search(r"== 5/6 finetune · \d min \d\d s elapsed$", resumed.stdout, re.MULTILINE)  # time left unknown
    assert (model / "run.json").read_text() != finished and not unfinished()

    # A run that was killed between the two steps of the replacement.
    model.rename(model.with_name("lcrec.before"))
    assert run(*flags).stdout.count("up to date, skipped") == 6


@NO_GPU
def test_changed_code_runs_its_stages_again(run, tmp_path):
    write_toy(tmp_path / "mine", users=70, items=9)
    flags = ("toy", "--data_path", tmp_path / "mine", "--config", "tiny.yaml")
    assert run(*flags).returncode == 0
    for file, stages in (
        ("reclingua/demo/app.py", ()),
        ("reclingua/training/callbacks.py", ("finetune", "test")),  # the test reads the new model
        ("reclingua/metrics/hit/hit.py", ("index", "finetune", "test")),
        ("reclingua/reporting/plots.py", ("test",)),
        ("index/kmeans.py", ("rqvae", "index", "finetune", "test")),
    ):
        with (run.folder / file).open("a") as code:
            code.write("# changed\n")
        done = run(*flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.findall(r"== \d/6 (\w+) ·", done.stdout) == [*stages], (file, done.stdout)
        assert not stages or f"made again, since {file} changed" in done.stdout


@NO_GPU
def test_a_second_run_on_a_dataset_is_refused(run, tmp_path):
    write_toy(tmp_path / "mine", users=70, items=9)
    lock = run.folder / "data/toy/.stages/lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run("toy", "--data_path", tmp_path / "mine", "--config", "tiny.yaml")
    assert done.returncode == 2 and "data/toy: another run.sh is at work on toy; wait" in done.stderr
    assert not (run.folder / "calls").exists()


@NO_GPU
def test_the_default_base_model_is_shared_by_all_datasets(run, tmp_path):
    for name in ("liked", "others"):
        write_preferences(tmp_path / "mine", name=name)
        done = run(name, "--method", "tallrec", "--data_path", tmp_path / "mine")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "== 1/3 base: up to date, skipped" in done.stdout


@NO_GPU
def test_bad_input_of_a_stage_changes_nothing(run, tmp_path):
    """With the input repaired, all stages are up to date, and other data makes all of them run again."""
    write_toy(tmp_path / "mine", users=70, items=9)
    flags = ("toy", "--data_path", tmp_path / "mine", "--config", "tiny.yaml")
    assert run(*flags).returncode == 0
    path, texts = tmp_path / "mine/toy/toy.item.json", (tmp_path / "mine/toy/toy.item.json").read_text()
    for command, stage, file, content in (
        ("index.embed", "embed", path, "{}"),
        ("finetune.py", "finetune", run.folder / "tiny.yaml", "targets: all\nno_such_flag: 1\n"),
    ):
        (run.folder / "fails").write_text(f"{command} 2\n")
        kept = file.read_text()
        file.write_text(content)
        broken = run(*flags)
        assert broken.returncode == 2 and f"error: {command}" in broken.stderr, broken.stderr
        assert f"stage {stage} failed; earlier stages are kept" in broken.stdout
        file.write_text(kept)
    (run.folder / "fails").unlink()
    assert path.read_text() == texts
    repaired = run(*flags, terminal=True, NO_COLOR="1")
    assert repaired.stdout.count("up to date, skipped") == 6, repaired.stdout + repaired.stderr
    assert has_stages(repaired, *LCREC) and "\x1b" not in repaired.stdout

    # Other data: all stages run again. The time left is that of the run before.
    write_toy(tmp_path / "mine", users=71, items=9)
    stages = run.folder / "data/toy/.stages"
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


@NO_GPU
def test_yes_no_methods_share_their_first_stage(run, tmp_path):
    write_preferences(tmp_path / "mine")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").touch()
    flags = ("liked", "--method", "cora", "--data_path", tmp_path / "mine", "--base_model", base)
    first = run(*flags)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "there is no GPU" in first.stdout and "the tuned model is ckpt/liked/cora-mf" in first.stdout
    assert has_stages(first, "tallrec", "test-tallrec", "pretrain-mf", "cora-mf", "test-cora-mf"), first.stdout
    second = run(*flags)
    assert second.returncode == 0 and second.stdout.count("up to date, skipped") == 5, second.stdout
    other = run("liked", "--method", "binllm", *flags[3:])
    assert other.returncode == 0 and other.stdout.count("up to date, skipped") == 2, other.stdout + other.stderr
    assert has_stages(other, "tallrec", "test-tallrec", "pretrain-hash", "binllm", "test-binllm")
    sampled = run("liked", "--method", "tallrec", *flags[3:], "--sample")
    assert "a sample: 800 rows" in sampled.stdout and "there is no GPU" not in sampled.stdout, sampled.stderr
    assert sampled.stdout.count("up to date, skipped") == 0 and (run.folder / "ckpt/liked/tallrec/run.json").exists()
    assert "the tuned model is ckpt/liked/tallrec-sample" in sampled.stdout  # beside the one of all rows
    assert {path.name for path in (run.folder / "results/liked").glob("*.json")} == {
        "tallrec.json", "tallrec-sample.json", "cora-mf.json", "binllm.json"
    }  # fmt: skip


@NO_GPU
def test_number_of_stages_is_known_at_the_first(run, tmp_path):
    """The other kinds of run, to their first heading: a file of the user lies where its output should be."""
    folder = write_toy(tmp_path / "mine")
    (folder / "toy.item.json").unlink()
    elapsed, left = r"0 min \d\d s elapsed", r", about \d+ min left"
    cases = {
        "": ("data/ml-100k/ml-100k.emb-minilm-td.npy", f"1/7 prepare · {elapsed}{left}"),
        "--config tiny.yaml --force": ("data/ml-100k/ml-100k.emb-minilm-td.npy", f"1/7 prepare · {elapsed}"),
        "--method collm --base_model x": ("ckpt/ml-100k/tallrec", f"1/6 prepare-preference · {elapsed}"),
        "--method tallrec --base_model x": ("ckpt/ml-100k/tallrec", "1/3 prepare-preference: up to date, skipped"),
        f"toy --data_path {folder.parent}": ("ckpt/toy/base", f"1/4 index · {elapsed}"),
    }
    (run.folder / "data/ml-100k").mkdir(parents=True)
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
        ("toy", "--sample"): "--sample has no effect with --method lcrec",
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
    (run.folder / "requirements.txt").write_text("other\n")  # a new environment needs a Python that fits
    done = run("toy", PYTHON="/nowhere/python3.9")
    assert done.returncode == 2 and "/nowhere/python3.9: Python 3.11, 3.12 or 3.13 is needed" in done.stderr
