"""Scripts run inside the test's process or as a user would run them."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

QUICK = ("--per_device_batch_size", 8, "--learning_rate", 1e-3, "--logging_steps", 50, "--use_cpu")


METHOD_FLAGS = {
    "tallrec": (),
    "collm": ("--cf_model", "mf"),
    "binllm": ("--cf_model", "hash"),
    "cora": ("--cf_model", "mf", "--lora_target_modules", "q_proj,k_proj,v_proj,o_proj", "--lora_r", 4),
    "softprompt": (),
    "personprompt": ("--soft_tokens", 2),
}


SPARSE = ("--save_and_eval_strategy", "steps", "--save_steps", 150)


def run_main(main, *argv):
    """A script's main with these arguments, for fixtures that outlive one test."""
    before, sys.argv = sys.argv, ["script", *map(str, argv)]
    try:
        main()
    finally:
        sys.argv = before


def flags(workshop, output, *more):
    where = ("--dataset", "toy", "--data_path", workshop / "datasets", "--base_model", workshop / "base")
    return *where, "--output_dir", output, *QUICK, *more


def tune(root, method, output, *more):
    flags = [root / flag if flag in ("mf", "hash", "sasrec") else flag for flag in METHOD_FLAGS[method]]
    given = ("--dataset", "liked", "--data_path", root, "--output_dir", output, "--method", method)
    short = ("--epochs", 1, "--max_his_len", 4, "--per_device_eval_batch_size", 64, "--max_eval_samples", 80)
    return *given, *QUICK, *short, *flags, *more


def measure(script, root, ckpt, *more, with_report=False):
    """Run test.py; returns its results and what it printed. A report takes longer than a test of a tiny model."""
    import test as test_script

    results = root / "results.json"
    flags = ("--ckpt_path", ckpt, "--data_path", root, "--results_file", results, *more)
    with nullcontext() if with_report else mock.patch.object(test_script, "write_report"):
        code, out, error = script(test_script.main, *flags)
    assert code == 0, error
    return json.loads(results.read_text()), out


def second(root, method, output, *more):
    return tune(root, method, output, "--init_from", root / "tallrec", *more)


def predictions(script, root, ckpt, *more, with_report=False):
    lines = root / "predictions.jsonl"
    results, _ = measure(script, root, ckpt, "--predictions_file", lines, *more, with_report=with_report)
    return results, [json.loads(line) for line in lines.read_text().splitlines()]


ROOT = Path(__file__).parents[2]


def copy_repository(folder):
    """Copy the repository without what it made and its .venv, whose stamp alone goes along; returns the folder."""
    made = ("ckpt", "results", "ml-100k", "shop", "site")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "tests", "docs", "[0-9]*", *made))
    (folder / ".venv").mkdir()
    shutil.copy(ROOT / ".venv/requirements.sha256", folder / ".venv")
    return folder


def redirect_output(out, err):
    """Write what this process prints, its libraries included, to two file descriptors."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)


def run_processes(count, main, *argv):
    """Run a script's main in several processes with the environment of torchrun; returns what a process of it would.

    They are forked: the libraries, whose import takes longer than most trainings, are loaded already. The real
    torchrun starts in test_lc_recs_own_commands and tests/inference/test_recommender.py.
    """
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        free.close()
        start = multiprocessing.get_context("fork").Process
        ranks = [start(target=_run_rank, args=(rank, shared, folder, main, argv)) for rank in range(count)]
        for process in ranks:
            process.start()
        while running := [process.sentinel for process in ranks if process.is_alive()]:
            wait(running)
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.terminate()  # those that wait for the one that failed
        code = next((process.exitcode for process in ranks if process.exitcode), 0)
        printed = {
            ending: "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{ending}")))
            for ending in ("out", "err")
        }
        return subprocess.CompletedProcess(argv, code, printed["out"], printed["err"])


def _run_rank(rank, shared, folder, main, argv):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    redirect_output(*(os.open(f"{folder}/{rank}.{ending}", os.O_WRONLY | os.O_CREAT) for ending in ("out", "err")))
    os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for state in (AcceleratorState, GradientState, PartialState):  # those of the trainings of the test's own process
        state._reset_state()
    sys.argv = ["script", *map(str, argv)]
    main()


def torchrun(processes, script, *argv):
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    return run("python", *start, script, *argv)


def run(*command):
    """A command as one would give it in the repository, its environment activated."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=400,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
