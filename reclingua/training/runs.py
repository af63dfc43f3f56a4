"""A training run from the Trainer to the saved model: what finetune.py and grpo.py share."""

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reclingua.training.arguments import TuningArguments
from reclingua.training.callbacks import Preempted
from reclingua.training.checkpoints import newest_checkpoint, report_disk_full
from reclingua.training.throughput import format_throughput
from reclingua.training.trainer import RecTrainer
from reclingua.utils.errors import InputError, mask_flags
from reclingua.utils.files import write_json
from reclingua.utils.memory import keep_freed_memory
from reclingua.utils.metadata import run_metadata
from reclingua.utils.precision import allow_tf32


def check_ranges(args: TuningArguments) -> None:
    """Raise InputError for flags of the Trainer whose values no command takes."""
    if args.per_device_eval_batch_size < 1 or not 0 <= args.seed < 2**32:
        raise InputError("--per_device_eval_batch_size should be 1 at least, --seed from 0 to below 2^32")


def prepare_device(args: TuningArguments) -> None:
    """Let a GPU compute float32 products in TF32 unless --tf32 states it; a CPU keeps freed memory."""
    if args.tf32 is None:
        allow_tf32(args.device.type)
    keep_freed_memory()


def train_and_save(
    trainer: RecTrainer,
    checkpoint: Path | None,
    flags: dict[str, Any],
    started: float,
    finish_model: Callable[[], None],
    log: Callable[[str], None],
) -> bool:
    """Train, save the model and write run.json; return whether training ended, and not by SIGTERM.

    Args:
        checkpoint: from which training resumes, if any.
        flags: written to run.json beside those of the Trainer.
        started: the `time.monotonic()` at which the run began.
        finish_model: called before the model is saved.
    """
    output_dir = str(trainer.args.output_dir)
    if checkpoint:
        log(f"resuming from {checkpoint}")
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Preempted:
        log(f"ended by SIGTERM; {newest_checkpoint(output_dir)} is written; resume with")
        log(f"  {resume_command()}")
        return False
    throughput = trainer.throughput.figures(trainer.accelerator)
    log(f"training itself took {throughput['seconds']:.0f} s: {format_throughput(throughput)}")
    finish_model()
    with report_disk_full(output_dir):
        trainer.save_model(output_dir)
    if trainer.args.process_index == 0:
        results = {"train_loss": result.training_loss, "throughput": throughput}
        write_run(trainer, flags | trainer.args.to_dict(), started, results)
        metric, best = trainer.args.metric_for_best_model, trainer.state.best_metric
        valid = f", valid {metric} {best:.4f}" if best else ""
        log(f"tuned in {time.monotonic() - started:.0f} s{valid} -> {output_dir}/")
    return True


def write_run(trainer: RecTrainer, flags: dict[str, Any], started: float, results: dict) -> None:
    """Write run.json beside the tuned model: flags, versions, seconds, the training log."""
    state = trainer.state
    content = {
        **run_metadata(flags, started),
        "seed": trainer.args.seed,
        "best_metric": state.best_metric,
        "best_step": state.best_global_step,
        **results,
        "log": state.log_history,
    }
    write_json(Path(str(trainer.args.output_dir)) / "run.json", content, indent=1)


def resume_command() -> str:
    """Return the command that resumes this run from its newest checkpoint, with *** for tokens and keys."""
    words = [word for word in mask_flags(sys.argv) if not word.startswith("--resume_from_checkpoint=")]
    if "--resume_from_checkpoint" in words:
        position = words.index("--resume_from_checkpoint")
        del words[position : position + 2]
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")  # set by torchrun
    start = f"torchrun --nproc_per_node {local}" if local else "python"
    if local != world:
        start = f"torchrun <as before, on every machine> --nproc_per_node {local}"
    return f"{start} {shlex.join(words)} --resume_from_checkpoint auto"


def leave_process_group(trainer: RecTrainer) -> None:
    """Release the process group: an object that holds it until the interpreter exits can abort the process."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
