"""Run several trainings in the same processes, whose start takes longer than the trainings:

torchrun --nproc_per_node 2 tests/helpers/zero_runs.py runs.json    # [{"argv": [flag, value, ...], ...}, ...]

{"argv": ..., "sigterm_at": step} ends a run by SIGTERM.
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

finetune.leave_process_group = lambda trainer: None  # the next run needs the process group
on_step_end = SaveOnSigtermCallback.on_step_end


def sigterm_at(step):
    """Return an `on_step_end` that sends SIGTERM to the last process alone when it has done that step."""

    def send_sigterm(self, args, state, control, **kwargs):
        if state.global_step == step and distributed.get_rank() > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    return send_sigterm


for run in json.loads(Path(sys.argv[1]).read_text()):
    SaveOnSigtermCallback.on_step_end = sigterm_at(run["sigterm_at"]) if "sigterm_at" in run else on_step_end
    sys.argv = ["finetune.py", *run["argv"]]
    finetune.main()
