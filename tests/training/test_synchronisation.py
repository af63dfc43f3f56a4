"""A training step asks a device for no number: on a GPU each such question waits for all that it has to do.

One question is not ours: without a mask, transformers asks in each forward pass whether positions are packed.
"""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import finetune
from reclingua.training.trainer import RecTrainer
from tests.helpers.scripts import flags, tune

LONG = ("--max_steps", 4, "--logging_steps", 100, "--save_and_eval_strategy", "no")


def is_called_by(function):
    """Whether a function of this name is among the callers."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a number of a tensor to Python: `int(tensor)`, `tensor.item()`, `if tensor`."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            is_theirs = is_called_by("find_packed_sequence_indices")
            self.counts["transformers" if is_theirs else "ours"] += 1
        self.counts["all"] += 1
        return function(*args, **(kwargs or {}))


class CountBetweenSteps(TrainerCallback):
    """Counts from the end of the first step to the end of the third, loading and moving of batches included."""

    def __init__(self, reads):
        self.reads = reads

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.reads.__enter__()
        elif state.global_step == 3:
            self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("method", ["lcrec", "tallrec", "collm", "cora"])
def test_a_training_step_reads_no_number_of_the_device(script, workshop, studio, tmp_path, monkeypatch, method):
    reads, train = HostReads(), RecTrainer.train

    def train_and_count(self, *args, **kwargs):
        self.add_callback(CountBetweenSteps(reads))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(RecTrainer, "train", train_and_count)
    if method == "lcrec":
        command = flags(workshop, tmp_path / "out", *LONG)
    else:
        command = tune(studio, method, tmp_path / "out", "--base_model", workshop / "base", *LONG)
    code, _, error = script(finetune.main, *command)
    assert code == 0, error
    assert reads.counts["all"] > 500  # two steps of forward, backward and update
    assert reads.counts["ours"] == 0 and reads.counts["transformers"] <= 2  # one a step
