"""Trainer callbacks."""

import math
from collections.abc import Callable

import torch
from torch import distributed
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from reclingua.datasets.samplers import LengthGroupedBatchSampler
from reclingua.training.throughput import Throughput
from reclingua.utils.errors import InputError


class SetEpochCallback(TrainerCallback):
    """Tells samples and batches which epoch it is, also after a resume in the middle of one."""

    def __init__(self, *listeners: Callable[[int], None]):
        self.listeners = listeners

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        for set_epoch in self.listeners:
            set_epoch(int(state.epoch or 0))


class StopAtMaxStepsCallback(TrainerCallback):
    """Where training goes on from its last step in the middle of an epoch: the Trainer would do one more."""

    def __init__(self, batches: LengthGroupedBatchSampler):
        self.batches = batches

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            self.batches.stop()


class ThroughputCallback(TrainerCallback):
    """Runs while there is training."""

    def __init__(self, throughput: Throughput):
        self.throughput = throughput

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.throughput.start()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.throughput.stop()


class ConsoleLogCallback(TrainerCallback):
    """The training log in words, one line at a time, under the progress bar of a terminal or without one."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        where = f"  step {state.global_step:>6,} of {state.max_steps:,}, epoch {state.epoch or 0:.1f}   "
        if "loss" in logs:
            tqdm.write(f"{where}loss {float(logs['loss']):.4f}   learning rate {float(logs['learning_rate']):.1e}")
        else:
            found = {name[5:]: value for name, value in logs.items() if name.startswith("eval_")}
            shown = [f"valid {name} {v:.4f}" for name, v in found.items() if "@" in name or name.endswith("auc")]
            if shown:
                tqdm.write(where + "   ".join(shown))


class StopOnNanCallback(TrainerCallback):
    """Ends a run whose loss is no number any more: what it would train from there on is worth nothing."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name in ("loss", "train_loss", "eval_loss"):
            if not math.isfinite(value := float((logs or {}).get(name, 0))):
                raise InputError(
                    f"the {name.replace('_', ' ')} is {value} by step {state.global_step}: lower --learning_rate, "
                    "warm up longer (--warmup_steps), or take --bf16 instead of --fp16; earlier checkpoints are kept"
                )


class Preempted(Exception):
    """Training was told to end, and a checkpoint of where it was is written."""


class SaveOnSigtermCallback(TrainerCallback):
    """Once `told`, as by the SIGTERM that a preempted job gets: ends the step, saves, and leaves by `Preempted`."""

    def __init__(self):
        self.told = self.stopping = False
        self.group = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.world_size > 1:  # what they agree by; not on a GPU, whose steps are not to wait for it
            self.group = distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not float(state.epoch).is_integer():  # else evaluation comes first, as it does without a signal
            self._stop_if_told(control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self._stop_if_told(control)

    def _stop_if_told(self, control) -> None:
        self.stopping = self.told
        if self.group is not None:  # all processes have to save the same step
            told = torch.tensor(int(self.told))
            distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self.group)
            self.stopping = bool(told)
        control.should_save |= self.stopping

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.stopping:
            raise Preempted


class ProgressBarCallback(ProgressCallback):
    """The Trainer's progress bar without its dump of the log and without a second bar, which moves the cursor."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        pass

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        pass
