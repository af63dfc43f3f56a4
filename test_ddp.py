"""Measure a tuned model with several processes, one a GPU, or on the CPU: test.py's program, flags and results.

torchrun --nproc_per_node 2 test_ddp.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k --num_beams 20 --exclude_seen
"""

import os
import sys

import torch
from torch import distributed

import test
from reclingua.utils.errors import InputError, cli_main
from reclingua.utils.processes import PATIENCE, claim_device


@cli_main
def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        test.main()  # prints the flags, and exits
    if not os.environ.get("RANK"):
        raise InputError("start it with torchrun --nproc_per_node <processes> test_ddp.py ...; or use test.py")
    claim_device()
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    test.main()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
