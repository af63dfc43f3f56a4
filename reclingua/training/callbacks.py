"""Trainer callbacks: epochs, stopping, throughput, the console log and the checkpoint on SIGTERM."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reclingua.datasets.samplers import LengthGroupedBatchSampler, RepeatedBatchSampler
from reclingua.training.throughput import Throughput
from reclingua.utils.errors import InputError
from reclingua.utils.text import format_duration

AGREEMENT_STEPS = 10  # between two agreements of several processes on whether one of them got SIGTERM


class SetEpochCallback(TrainerCallback):
    """Passes the number of the epoch to the dataset and the batch sampler, also after a resume within an epoch."""

    def __init__(self, *listeners: Callable[[int], None]):
        self.listeners = listeners

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        for set_epoch in self.listeners:
            set_epoch(int(state.epoch or 0))


class StopAtMaxStepsCallback(TrainerCallback):
    """Works around the Trainer taking one extra step when it resumes at `max_steps` within an epoch."""

    def __init__(self, batches: LengthGroupedBatchSampler | RepeatedBatchSampler):
        self.batches = batches

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            self.batches.stop()


class RelocateBestCallback(TrainerCallback):
    """Finds the best checkpoint of a resumed run, whose output folder can have moved since its path was stored.

    resumed: the checkpoint that the run resumes from; None at the beginning.
    """

    def __init__(self) -> None:
        self.resumed: str | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.resumed is None or not state.best_global_step:
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        folders = (Path(self.resumed).parent, Path(args.output_dir))
        path = next((str(folder / name) for folder in folders if (folder / name).is_dir()), None)
        state.best_model_checkpoint = path or state.best_model_checkpoint  # the stored path, if it still exists
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            if state.is_world_process_zero:
                print(f"{name}, the best so far, is gone: the best is chosen among the checkpoints from here on")
            state.best_metric = state.best_global_step = None


class ThroughputCallback(TrainerCallback):
    """Starts and stops the clock of `Throughput` with the training."""

    def __init__(self, throughput: Throughput):
        self.throughput = throughput

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.throughput.start()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.throughput.stop()


class ConsoleLogCallback(TrainerCallback):
    """Prints loss, learning rate, time left and valid metrics, below the progress bar or without one."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        progress = f"  step {state.global_step:>6,} of {state.max_steps:,}, epoch {state.epoch or 0:.1f}   "
        if "loss" in logs:
            seconds = (time.monotonic() - self.began) / max(1, state.global_step - self.first_step)
            left = format_duration(seconds * (state.max_steps - state.global_step))
            rate = f"learning rate {float(logs['learning_rate']):.1e}"
            reward = f"reward {float(logs['reward']):.4f}   " if "reward" in logs else ""
            tqdm.write(f"{progress}loss {float(logs['loss']):.4f}   {reward}{rate}   about {left} left")
            return
        metrics = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        shown = [f"valid {name} {value:.4f}" for name, value in metrics.items() if "@" in name or name.endswith("auc")]
        if shown:
            tqdm.write(progress + "   ".join(shown))


class StopOnNanCallback(TrainerCallback):
    """Ends a run whose loss is not finite, since no later step can repair its weights."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name in ("loss", "train_loss", "eval_loss"):
            if not math.isfinite(value := float((logs or {}).get(name, 0))):
                raise InputError(
                    f"the {name.replace('_', ' ')} is {value} at step {state.global_step}: lower --learning_rate, "
                    "warm up longer (--warmup_steps), or take --bf16 instead of --fp16; earlier checkpoints are kept"
                )


class Preempted(Exception):
    """Raised when training has ended on SIGTERM and its checkpoint is written."""


class SaveOnSigtermCallback(TrainerCallback):
    """Ends the step, saves a checkpoint and raises `Preempted` once `sigterm_received` is set.

    All processes save the same step, also if only one of them got the signal: they reduce the flag after every
    AGREEMENT_STEPS steps, since it makes them wait for each other.
    """

    def __init__(self):
        self.sigterm_received = self.is_stopping = False
        self.group = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.world_size > 1:  # gloo reduces on the CPU, so that the steps of a GPU do not wait for it
            self.group = distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        ends_epoch = float(state.epoch).is_integer()  # then after the evaluation, as without SIGTERM
        if not ends_epoch and (self.group is None or state.global_step % AGREEMENT_STEPS == 0):
            self._stop_on_sigterm(control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self._stop_on_sigterm(control)

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.is_stopping:
            raise Preempted

    def _stop_on_sigterm(self, control) -> None:
        self.is_stopping = self.sigterm_received
        if self.group is not None:
            received = torch.tensor(int(self.sigterm_received))
            distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self.group)
            self.is_stopping = bool(received)
        control.should_save |= self.is_stopping


class ProgressBarCallback(ProgressCallback):
    """Progress bar of the Trainer without its dump of the log and without the second bar, which moves the cursor."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        pass

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        pass
