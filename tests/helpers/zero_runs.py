"""Trainings one after another in the same processes, since starting these takes longer than what they do:

torchrun --nproc_per_node 2 tests/helpers/zero_runs.py runs.json    # [{"argv": [flag, value, ...], ...}, ...]

A run may be told to end: {"argv": ..., "sigterm_at": step}.
"""

import json
import os
import signal
import sys
from pathlib import Path

from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[2]))
import finetune
from reclingua.training.callbacks import SaveOnSigtermCallback

finetune.leave = lambda trainer: None  # the next run needs the process group
on_step_end = SaveOnSigtermCallback.on_step_end


def tell_one(step):
    """SIGTERM for the last process alone, when it has done that step."""

    def told(self, args, state, control, **kwargs):
        if state.global_step == step and distributed.get_rank() > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    return told


for run in json.loads(Path(sys.argv[1]).read_text()):
    SaveOnSigtermCallback.on_step_end = tell_one(run["sigterm_at"]) if "sigterm_at" in run else on_step_end
    sys.argv = ["finetune.py", *run["argv"]]
    finetune.main()
