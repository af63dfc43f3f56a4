"""A training that is ended by whatever means goes on as if nothing had been; a checkpoint is complete or invisible."""

import multiprocessing
import os
import random
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
from tests.helpers.scripts import ROOT, flags, run_main

HOW = ("--targets", "all", "--max_his_len", 4, "--epochs", 6, "--logging_steps", 5)
HOW += (
    "--save_and_eval_strategy",
    "steps",
    "--save_steps",
    6,
    "--max_eval_samples",
    8,
    "--resume_from_checkpoint",
    "auto",
)


@pytest.fixture(scope="module")
def undisturbed(workshop, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    run_main(finetune.main, *flags(workshop, folder, *HOW))
    return folder


@pytest.fixture
def start(workshop, tmp_path):
    """start(before): finetune.py into tmp_path/out, in a process of its own, which calls `before` first."""

    def work(before):
        with open(tmp_path / "said.txt", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        before()
        run_main(finetune.main, *flags(workshop, tmp_path / "out", *HOW))

    def begin(before=lambda: None):
        process = multiprocessing.get_context("fork").Process(target=work, args=(before,))
        process.start()
        return process

    return begin


def assert_as_undisturbed(folder, undisturbed):
    theirs, ours = (load_file(each / "model.safetensors") for each in (undisturbed, folder))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_which_checkpoints_are_kept(tmp_path):
    def kept(limit, *names):
        for number in (2, 10, 4, 6):
            (tmp_path / f"checkpoint-{number}").mkdir(exist_ok=True)
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").touch()
        rotate_checkpoints(tmp_path, limit, *names)
        return {path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir()}

    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-of-mine" / "trainer_state.json").touch()
    assert kept(None, "checkpoint-10", "checkpoint-2") == {"2", "4", "6", "10", "of-mine"}
    assert kept(1, "checkpoint-10", "checkpoint-2") == {"2", "10", "of-mine"}
    assert kept(3, "checkpoint-10", "checkpoint-2") == {"2", "6", "10", "of-mine"}
    assert kept(1, "checkpoint-10", "checkpoint-10") == {"10", "of-mine"}
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"


def assert_whole(output_dir, undisturbed):
    """Every checkpoint that is to be seen can be loaded."""
    files = {path.name for path in newest_checkpoint(undisturbed).iterdir()}
    for folder in output_dir.glob("checkpoint-*"):
        assert {path.name for path in folder.iterdir()} == files
        load_file(folder / "model.safetensors")
        torch.load(folder / "optimizer.pt", weights_only=True)


def test_killed_three_times(start, undisturbed, tmp_path):
    draw, kills = random.Random(), 0
    while kills < 3:
        process = start()
        time.sleep(draw.uniform(0.5, 2.5))
        kills += process.exitcode is None
        process.kill()
        process.join()
        assert_whole(tmp_path / "out", undisturbed)
        if process.exitcode == 0:  # it was done before
            shutil.rmtree(tmp_path / "out")
    process = start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    assert_as_undisturbed(tmp_path / "out", undisturbed)
    assert not (tmp_path / "out" / STAGING_DIR).exists()


def test_killed_while_it_saves(start, undisturbed, tmp_path):
    def break_the_second_checkpoint():
        save, calls = torch.save, []

        def half(content, path):
            calls.append(path)
            save(content, path)
            if len([path for path in calls if "optimizer" in str(path)]) == 2:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half

    process = start(break_the_second_checkpoint)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-6"
    assert (tmp_path / "out" / STAGING_DIR / "checkpoint-12" / "model.safetensors").exists()
    assert_whole(tmp_path / "out", undisturbed)
    process = start()
    process.join()
    assert "going on from" in (tmp_path / "said.txt").read_text()
    assert_as_undisturbed(tmp_path / "out", undisturbed)


def test_a_run_that_was_at_its_end_does_no_step_more(workshop, tmp_path, capsys):
    how = (*HOW, "--max_steps", 5, "--lr_scheduler_type", "constant", "--load_best_model_at_end", "False")
    found = []
    for _ in range(2):
        run_main(finetune.main, *flags(workshop, tmp_path / "out", *how))
        found.append(load_file(tmp_path / "out" / "model.safetensors"))
    assert "going on from" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_sigterm_saves_and_says_how_to_go_on(start, undisturbed, tmp_path, monkeypatch):
    process = start()
    while not newest_checkpoint(tmp_path / "out"):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 0, said
    first, second = said.splitlines()[-2:]
    assert first.startswith("ended by SIGTERM; ") and str(newest_checkpoint(tmp_path / "out")) in first
    assert not (tmp_path / "out" / "run.json").exists()
    command = shlex.split(second)
    assert command[0] == "python" and command.count("--resume_from_checkpoint") == 1
    run_main(finetune.main, *command[2:])
    assert_as_undisturbed(tmp_path / "out", undisturbed)


def test_sigterm_for_processes_that_read_samples_as_well(workshop, tmp_path):
    """As torchrun sends it: without them there would be no step to end."""
    argv = (*HOW, "--epochs", 400, "--save_steps", 1000, "--logging_steps", 1, "--dataloader_num_workers", 2)
    command = [sys.executable, "finetune.py", *map(str, flags(workshop, tmp_path / "out", *argv))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if " loss " in line:
                os.killpg(process.pid, signal.SIGTERM)
                break
        said = process.stdout.read()
    assert process.returncode == 0 and "ended by SIGTERM" in said, said
    assert newest_checkpoint(tmp_path / "out")


def test_a_full_disk_leaves_the_last_checkpoint(start, undisturbed, tmp_path):
    size = (newest_checkpoint(undisturbed) / "optimizer.pt").stat().st_size

    def fill_after_the_first():
        save, calls = torch.save, []

        def limited(content, path):
            calls.append(path)
            if len([path for path in calls if "optimizer" in str(path)]) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
            save(content, path)

        torch.save = limited

    process = start(fill_after_the_first)
    process.join()
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 2, said
    assert said.count("error:") == 1 and "could not be written" in said and "checkpoint-6 is whole" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-6"]
    assert_whole(tmp_path / "out", undisturbed)
    assert start().join() is None
    assert_as_undisturbed(tmp_path / "out", undisturbed)
