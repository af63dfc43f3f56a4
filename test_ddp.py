"""Measure a tuned model with several processes, one a GPU, or on the CPU: test.py's program, flags and results.

torchrun --nproc_per_node 2 test_ddp.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k --num_beams 20 --exclude_seen
"""

import os
import sys
from datetime import timedelta

import torch
from torch import distributed

import test
from reclingua.utils.errors import InputError, cli_main


@cli_main
def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        test.main()  # prints the flags, and exits
    if not os.environ.get("RANK"):
        raise InputError("start it with torchrun --nproc_per_node <processes> test_ddp.py ...; or use test.py")
    if torch.cuda.is_available():
        if (gpu := int(os.environ["LOCAL_RANK"])) >= (gpus := torch.cuda.device_count()):
            raise InputError(
                f"torchrun --nproc_per_node: this machine has {gpus} GPUs, a process needs one of its own"
            )
        torch.cuda.set_device(gpu)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # what torchrun sets, however many cores there are
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    # A process that has no more users waits for the others: that is no failure.
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=12))
    test.main()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
