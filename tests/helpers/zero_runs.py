"""Several trainings in the same processes, whose start takes longer than a training."""

import os
import signal
import sys

from torch import distributed

import finetune
from reclingua.training import callbacks
from reclingua.training.callbacks import SaveOnSigtermCallback


def train_all(runs):
    """Train all {"argv": [flag, value, ...]} one after another; with "sigterm_at": step a SIGTERM ends the run."""
    callbacks.AGREEMENT_STEPS = 3  # these trainings are short
    on_step_end, finetune.leave_process_group = SaveOnSigtermCallback.on_step_end, lambda trainer: None
    for run in runs:
        SaveOnSigtermCallback.on_step_end = sigterm_at(run["sigterm_at"]) if "sigterm_at" in run else on_step_end
        sys.argv = ["finetune.py", *run["argv"]]
        finetune.main()


def sigterm_at(step, on_step_end=SaveOnSigtermCallback.on_step_end):
    """Return an `on_step_end` that sends SIGTERM to the last process alone when it has done that step."""

    def send_sigterm(self, args, state, control, **kwargs):
        if state.global_step == step and distributed.get_rank() > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    return send_sigterm
