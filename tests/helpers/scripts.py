"""Scripts run inside the test's process or as a user would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    return *given, *QUICK, "--epochs", 1, "--max_his_len", 4, "--per_device_eval_batch_size", 64, *flags, *more


def measure(script, root, ckpt, *more):
    import test as test_script

    results = root / "results.json"
    code, out, error = script(
        test_script.main, "--ckpt_path", ckpt, "--data_path", root, "--results_file", results, *more
    )
    assert code == 0, error
    return json.loads(results.read_text()), out


def second(root, method, output, *more):
    return tune(root, method, output, "--init_from", root / "tallrec", *more)


def predictions(script, root, ckpt, *more):
    lines = root / "predictions.jsonl"
    results, _ = measure(script, root, ckpt, "--predictions_file", lines, *more)
    return results, [json.loads(line) for line in lines.read_text().splitlines()]


ROOT = Path(__file__).parents[2]


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
