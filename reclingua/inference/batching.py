"""The loop that Recommender and Scorer share: batches over all processes, in evaluation mode, retried on OOM."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import distributed
from tqdm import tqdm

from reclingua.utils.errors import InputError
from reclingua.utils.memory import run_with_oom_retry

Result = TypeVar("Result")


def split_batches(rows: list[int], batch_size: int) -> list[list[int]]:
    """Cut rows, in the order they are to be computed, into batches of `batch_size`; InputError if that is below 1."""
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: should be 1 at least")
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def map_batches(
    model: torch.nn.Module,
    compute: Callable[[list[int]], Result],
    batches: list[list[int]],
    unit: str,
    advice: str,
    show_progress: bool = False,
) -> Iterator[tuple[list[int], Result]]:
    """Yield (rows, `compute(rows)`) for every batch of this process, the model in evaluation mode.

    Where there is a process group, the batches are shared out among its processes. They are those of a single
    process, so that the number of processes changes no score (with other numbers of threads the last bits can differ).

    Args:
        unit: what a row is ("user"), for the progress bar and messages.
        advice: what to do if memory does not suffice for one row.

    Raises:
        InputError: memory does not suffice for one row.
    """
    if distributed.is_initialized():
        batches = batches[distributed.get_rank() :: distributed.get_world_size()]
        show_progress = show_progress and distributed.get_rank() == 0
    was_training = model.training
    model.eval()
    total = sum(map(len, batches))
    try:
        with tqdm(total=total, unit=unit, disable=None if show_progress else True, leave=False) as bar:
            for rows, result in run_with_oom_retry(compute, batches, unit, advice):
                yield rows, result
                bar.update(len(rows))
    finally:
        model.train(was_training)
