"""Processes of torchrun: the device of each, and how those that work each by itself wait for each other."""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch.distributed.rendezvous import rendezvous

from reclingua.utils.errors import InputError
from reclingua.utils.memory import keep_freed_memory
from reclingua.utils.precision import allow_tf32

PATIENCE = timedelta(hours=12)  # a process that has no more work waits for the others: that is no failure


def claim_device(gpu_id: int = 0) -> str:
    """Return the device of this process: the GPU of its local rank under torchrun, else GPU `gpu_id`, or the CPU.

    A GPU computes float32 products in TF32 from now on. On a CPU the processes share out the cores, and keep freed
    memory for the next tensor.

    Raises:
        InputError: this machine has no such GPU.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if torch.cuda.is_available():
        gpus, gpu = torch.cuda.device_count(), gpu_id if local_rank is None else int(local_rank)
        if local_rank is not None and gpu >= gpus:
            raise InputError(
                f"torchrun --nproc_per_node: this machine has {gpus} GPUs, a process needs one of its own"
            )
        if not 0 <= gpu < gpus:
            raise InputError(f"--gpu_id {gpu}: this machine has {gpus} GPUs")
        torch.cuda.set_device(gpu)
        allow_tf32("cuda")
        return f"cuda:{gpu}"
    if local_rank is not None and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun sets it, whatever the cores
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    keep_freed_memory()
    return "cpu"


class Processes:
    """The processes of torchrun, or this one alone. They form no process group, so that each computes by itself.

    Attributes:
        rank, count: number of this process, and of all processes.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        self._store = next(rendezvous("env://", timeout=PATIENCE))[0] if self.count > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes what belongs to all."""
        return self.rank == 0

    def announce(self, event: str) -> None:
        """Tell the others that `event` has happened in this process."""
        if self._store is not None:
            self._store.set(f"{event}/{self.rank}", "1")

    def wait_for(self, event: str, ranks: Iterable[int]) -> None:
        """Return once all of `ranks` have announced `event`."""
        if self._store is not None:
            self._store.wait([f"{event}/{rank}" for rank in ranks], PATIENCE)
