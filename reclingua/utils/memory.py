"""Memory: keep what is freed for the next tensor, and retry a batch with half its size when it runs out."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from reclingua.utils.errors import InputError

Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor on the CPU; another C library, and MALLOC_*, stay as they are.

    By default it returns every large block to the system, and a new one then costs a page fault every 4 KB: a fourth
    of the time of a small model's search. The peak of the memory hardly changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_THRESHOLD, 2**30)


def run_with_oom_retry(
    run_batch: Callable[[list[int]], Result], batches: list[list[int]], unit: str, advice: str
) -> Iterator[tuple[list[int], Result]]:
    """Yield (rows, result of `run_batch(rows)`) for all batches, which halve whenever memory runs out.

    A batch that was too large is split and retried; the size that fitted is kept for all later batches.

    Args:
        unit: what a row is, in messages.
        advice: what to do when even one row does not fit.

    Raises:
        InputError: memory does not suffice for one row.
    """
    max_rows = max(map(len, batches), default=0)
    pending = batches[::-1]
    while pending:
        rows = pending.pop()
        if len(rows) > max_rows:
            pending += [rows[max_rows:], rows[:max_rows]]
            continue
        try:
            result = run_batch(rows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            yield rows, result
            continue
        # Outside the except clause the exception no longer keeps the batch's tensors alive.
        clear_device_cache(garbage_collection=True)
        if len(rows) == 1:
            raise InputError(f"out of memory with one {unit} in the batch; {advice}")
        max_rows = len(rows) // 2
        pending.append(rows)
        tqdm.write(f"out of memory with {len(rows)} {unit}s in a batch: retrying with {max_rows}", file=sys.stderr)


def out_of_memory(error: Exception) -> bool:
    """Return whether an exception means that the memory of a device or of the host ran out."""
    texts = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
    return is_known or any(text in str(error) for text in texts)
