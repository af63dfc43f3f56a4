"""Checkpoints are atomic, and a resumed run ends with the weights of an uninterrupted one, whatever ended it."""

import itertools
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import finetune
from reclingua.training.checkpoints import STAGING_DIR, newest_checkpoint, rotate_checkpoints
from reclingua.training.trainer import RecTrainer
from reclingua.utils.files import locked_folder
from tests.helpers.scripts import ROOT, flags, redirect_output, run_main

pytestmark = pytest.mark.slow

FLAGS = ("--targets", "all", "--max_his_len", 4, "--epochs", 6, "--logging_steps", 5)
FLAGS += ("--save_and_eval_strategy", "steps", "--save_steps", 6, "--max_eval_samples", 8)
FLAGS += ("--resume_from_checkpoint", "auto")


@pytest.fixture(scope="module")
def uninterrupted(workshop, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_main(finetune.main, *flags(workshop, folder, *FLAGS))
    return folder


@pytest.fixture
def start(workshop, tmp_path):
    """start(before, *flags): run finetune.py into tmp_path/out in a process of its own, which calls `before` first."""

    def train(before, more):
        with open(tmp_path / "printed.txt", "w") as file:
            redirect_output(file.fileno(), file.fileno())
        before()
        run_main(finetune.main, *flags(workshop, tmp_path / "out", *FLAGS, *more))

    def start_process(before=lambda: None, *more):
        process = multiprocessing.get_context("fork").Process(target=train, args=(before, more))
        process.start()
        return process

    return start_process


def assert_same_weights(folder, uninterrupted):
    theirs, ours = (load_file(path / "model.safetensors") for path in (uninterrupted, folder))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_rotation_keeps_protected_and_newest_checkpoints(tmp_path):
    def remaining(limit, *protected):
        for number in (2, 10, 4, 6):
            (tmp_path / f"checkpoint-{number}").mkdir(exist_ok=True)
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").touch()
        rotate_checkpoints(tmp_path, limit, *protected)
        return {path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir()}

    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-of-mine" / "trainer_state.json").touch()
    assert remaining(None, "checkpoint-10", "checkpoint-2") == {"2", "4", "6", "10", "of-mine"}
    assert remaining(1, "checkpoint-10", "checkpoint-2") == {"2", "10", "of-mine"}
    assert remaining(3, "checkpoint-10", "checkpoint-2") == {"2", "6", "10", "of-mine"}
    assert remaining(1, "checkpoint-10", "checkpoint-10") == {"10", "of-mine"}
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"


def assert_complete(output_dir, uninterrupted):
    """Every visible checkpoint can be loaded."""
    files = {path.name for path in newest_checkpoint(uninterrupted).iterdir()}
    for folder in output_dir.glob("checkpoint-*"):
        assert {path.name for path in folder.iterdir()} == files
        load_file(folder / "model.safetensors")
        torch.load(folder / "optimizer.pt", weights_only=True)


def killed_in_step(number):
    """Return a function for `start`: the process kills itself in the step with this number, from 1."""

    def arrange():
        step, steps = RecTrainer.training_step, itertools.count(1)

        def training_step(*args, **kwargs):
            if next(steps) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        RecTrainer.training_step = training_step

    return arrange


def test_resume_after_three_kills(start, uninterrupted, tmp_path):
    """Before the first checkpoint, after it, and in the middle of a resumed run."""
    for number, newest in ((4, None), (9, "checkpoint-6"), (10, "checkpoint-12")):
        process = start(killed_in_step(number))
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "printed.txt").read_text()
        assert_complete(tmp_path / "out", uninterrupted)
        assert getattr(newest_checkpoint(tmp_path / "out"), "name", None) == newest
    process = start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "printed.txt").read_text()
    assert_same_weights(tmp_path / "out", uninterrupted)
    assert not (tmp_path / "out" / STAGING_DIR).exists()


def test_resume_after_a_kill_within_a_save(start, uninterrupted, tmp_path):
    def truncate_second_checkpoint():
        save, calls = torch.save, []

        def save_half(content, path):
            calls.append(path)
            save(content, path)
            if len([path for path in calls if "optimizer" in str(path)]) == 2:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save_half

    process = start(truncate_second_checkpoint)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-6"
    assert (tmp_path / "out" / STAGING_DIR / "checkpoint-12" / "model.safetensors").exists()
    assert_complete(tmp_path / "out", uninterrupted)
    process = start()
    process.join()
    assert f"from {tmp_path / 'out' / 'checkpoint-6'}" in (tmp_path / "printed.txt").read_text()
    assert_same_weights(tmp_path / "out", uninterrupted)


def resume_with_best(start, tmp_path, name, *, is_kept):
    """Cut a run after checkpoint-12, make checkpoint-6 its best, move its folder to `name` and resume it there."""
    process = start(killed_in_step(15), "--save_total_limit", 9)
    process.join()
    state_file = tmp_path / "out/checkpoint-12/trainer_state.json"
    state = json.loads(state_file.read_text())
    state |= {"best_global_step": 6, "best_metric": 2.0}
    state["best_model_checkpoint"] = str(tmp_path / "out/checkpoint-6")
    state_file.write_text(json.dumps(state))
    if not is_kept:
        shutil.rmtree(tmp_path / "out/checkpoint-6")
    (tmp_path / "out").rename(tmp_path / name)
    process = start(lambda: None, "--output_dir", tmp_path / name)
    process.join()
    assert process.exitcode == 0, (tmp_path / "printed.txt").read_text()
    return json.loads((tmp_path / name / "run.json").read_text())


def test_the_best_checkpoint_is_found_in_a_moved_folder(start, tmp_path):
    run = resume_with_best(start, tmp_path, "moved", is_kept=True)
    assert run["best_step"] == 6 and run["best_metric"] == 2.0
    assert_same_weights(tmp_path / "moved", tmp_path / "moved/checkpoint-6")


def test_the_metric_of_a_best_checkpoint_that_is_gone_is_not_reported(start, tmp_path):
    run = resume_with_best(start, tmp_path, "moved", is_kept=False)
    assert "checkpoint-6, the best so far, is gone" in (tmp_path / "printed.txt").read_text()
    assert run["best_step"] > 12 and run["best_metric"] < 2
    assert_same_weights(tmp_path / "moved", tmp_path / f"moved/checkpoint-{run['best_step']}")


def test_a_second_run_into_the_folder_is_refused(workshop, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(finetune, "locked_folder", lambda folder: locked_folder(folder, patience=0))
    (tmp_path / "out").mkdir()
    with locked_folder(tmp_path / "out"):
        assert "another run is writing there" in refused(finetune.main, *flags(workshop, tmp_path / "out", *FLAGS))
    (tmp_path / "out/config.json").touch()
    assert "a model but no checkpoint" in refused(finetune.main, *flags(workshop, tmp_path / "out", *FLAGS))


def test_resuming_a_finished_run_takes_no_step(workshop, tmp_path, capsys):
    more = (*FLAGS, "--max_steps", 5, "--lr_scheduler_type", "constant", "--load_best_model_at_end", "False")
    weights = []
    for _ in range(2):
        run_main(finetune.main, *flags(workshop, tmp_path / "out", *more))
        weights.append(load_file(tmp_path / "out" / "model.safetensors"))
    assert f"from {tmp_path / 'out' / 'checkpoint-5'}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_sigterm_saves_and_prints_the_command_to_resume(start, uninterrupted, tmp_path, monkeypatch):
    process = start()
    while not newest_checkpoint(tmp_path / "out"):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    printed = (tmp_path / "printed.txt").read_text()
    assert process.exitcode == 0, printed
    first, second = printed.splitlines()[-2:]
    assert "SIGTERM" in first and str(newest_checkpoint(tmp_path / "out")) in first
    assert not (tmp_path / "out" / "run.json").exists()
    command = shlex.split(second)
    assert command[0] == "python" and command.count("--resume_from_checkpoint") == 1
    run_main(finetune.main, *command[2:])
    assert_same_weights(tmp_path / "out", uninterrupted)


def test_sigterm_for_data_loader_processes_too(workshop, tmp_path):
    """Torchrun sends it to the whole process group; without its data loader a training could not end the step."""
    argv = (*FLAGS, "--epochs", 400, "--save_steps", 1000, "--logging_steps", 1, "--dataloader_num_workers", 2)
    command = [sys.executable, "finetune.py", *map(str, flags(workshop, tmp_path / "out", *argv))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if " loss " in line:
                os.killpg(process.pid, signal.SIGTERM)
                break
        printed = process.stdout.read()
    assert process.returncode == 0 and "SIGTERM" in printed, printed
    assert newest_checkpoint(tmp_path / "out")


def test_full_disk_keeps_the_last_checkpoint(start, uninterrupted, tmp_path):
    size = (newest_checkpoint(uninterrupted) / "optimizer.pt").stat().st_size

    def fill_disk_after_first_checkpoint():
        save, calls = torch.save, []

        def save_limited(content, path):
            calls.append(path)
            if len([path for path in calls if "optimizer" in str(path)]) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
            save(content, path)

        torch.save = save_limited

    process = start(fill_disk_after_first_checkpoint)
    process.join()
    printed = (tmp_path / "printed.txt").read_text()
    assert process.exitcode == 2, printed
    assert printed.count("error:") == 1 and "could not be written" in printed and "checkpoint-6 is complete" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-6"]
    assert_complete(tmp_path / "out", uninterrupted)
    assert start().join() is None
    assert_same_weights(tmp_path / "out", uninterrupted)
