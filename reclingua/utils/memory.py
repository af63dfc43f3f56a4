"""Work in batches that get smaller when memory runs out."""

import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from reclingua.utils.errors import InputError

Result = TypeVar("Result")


def run_with_oom_retry(
    work: Callable[[list[int]], Result], batches: list[list[int]], unit: str, advice: str
) -> Iterator[tuple[list[int], Result]]:
    """(rows, what came of them) for all batches, in smaller ones from the first that does not fit into memory.

    Raises:
        InputError: memory does not suffice for one row; it gives the `advice`.
    """
    most = max(map(len, batches), default=0)
    waiting = batches[::-1]
    while waiting:
        rows = waiting.pop()
        if len(rows) > most:
            waiting += [rows[most:], rows[:most]]
            continue
        try:
            result = work(rows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            yield rows, result
            continue
        # Out of the except clause the error no longer holds the tensors of the work.
        clear_device_cache(garbage_collection=True)
        if len(rows) == 1:
            raise InputError(f"memory ran out with one {unit} in the batch; {advice}")
        most = len(rows) // 2
        waiting.append(rows)
        tqdm.write(f"memory ran out with {len(rows)} {unit}s in a batch: going on with {most}", file=sys.stderr)


def out_of_memory(error: Exception) -> bool:
    """Whether a device's or the machine's memory did not suffice."""
    texts = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
    return known or any(text in str(error) for text in texts)
