"""Batch sampler: length-grouped or packed batches, by sample count or token budget, for one or several processes."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from reclingua.utils.errors import InputError

ORDERS = ("group_by_length", "random", "sequential")


class LengthGroupedBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batch sampler that yields the batches of one process, sample numbers.

    Every epoch has the same number of steps, and so has every process. Each sample is in one batch of one process
    (except where batches are single samples: then some samples are repeated so that no process runs out).

    The samples in their order are cut at `boundaries`; step s of process r takes piece s * processes + r. With
    "group_by_length" and two processes:

        samples, longest first   | 50 49 | 48 46 45 | 44 44 40 | 39 38 38 | ... | 9 8 8 7 | 5 5 4 3 |
        piece                        0        1          2          3               6         7
        step                         0        0          1          1               3         3
        process                      0        1          0          1               0         1

    The processes thus work on batches of similar length at the same time. Steps are shuffled, except for step 0 with
    the longest samples: if memory is short, it runs out at once.

    Args:
        lengths: largest number of tokens that each sample can have in any epoch.
        batch_size: largest number of samples of a batch; ignored where `max_tokens` is given.
        max_tokens: largest number of tokens of a batch; padding counts, unless samples are `packed`.
        packed: samples are packed without padding.
        order: "group_by_length" sorts samples by length (equal lengths shuffled) and shuffles the steps; "random" or
            "sequential" is the order of the samples.
        rank, processes: number of this process and of all processes.
        epoch_lengths: returns the number of tokens of each sample in the current epoch, by which they are sorted
            (default: `lengths`).

    Raises:
        InputError: a sample has more tokens than a batch can have.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int = 8,
        max_tokens: int = 0,
        packed: bool = False,
        order: str = "group_by_length",
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        epoch_lengths: Callable[[], np.ndarray] | None = None,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.epoch_lengths = epoch_lengths or (lambda: self.lengths)
        self.order, self.seed, self.epoch, self.stopped = order, seed, 0, False
        self.rank, self.processes = rank, processes
        self.window = 0.0  # average number of tokens of a packed batch
        samples, longest, tokens = len(self.lengths), int(self.lengths.max()), int(self.lengths.sum())
        if max_tokens and not packed and order != "group_by_length":
            raise InputError(
                "--max_tokens_per_batch needs --packing or --train_sampling_strategy group_by_length: "
                "in another order padding decides how many samples fit"
            )
        if max_tokens and max_tokens < (minimum := 2 * longest if packed else longest):
            raise InputError(
                f"--max_tokens_per_batch {max_tokens}: should be {minimum} at least, since a sample has up to "
                f"{longest} tokens{' and packing needs room for two' if packed else ''}; or lower --max_his_len"
            )
        self.boundaries = [0, samples]
        if not max_tokens:
            count = -(-samples // batch_size)
        elif packed:
            # A batch gets the samples that start within its window of tokens; the last of them can exceed the window.
            count = -(-tokens // (max_tokens - longest + 1))
        else:
            self.boundaries = self._greedy_boundaries(max_tokens)
            count = len(self.boundaries) - 1
        self.steps = -(-count // processes)
        count = self.steps * processes
        self.num_drawn = max(samples, count)
        if not max_tokens or samples < count:
            self.boundaries = np.linspace(0, self.num_drawn, count + 1).astype(int).tolist()
        elif packed:
            self.window = tokens / count
        else:
            self.boundaries = split_widest(self.boundaries, count)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def stop(self) -> None:
        """Yield no more batches: a training resumed at its last step has nothing left to do."""
        self.stopped = True

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        if self.stopped:
            return
        generator = np.random.default_rng((self.seed, self.epoch))
        order = np.arange(len(self.lengths))
        if self.order != "sequential":
            generator.shuffle(order)
        if self.order == "group_by_length":
            order = order[np.argsort(-self.epoch_lengths()[order], kind="stable")]
        order = np.resize(order, self.num_drawn)
        boundaries = self.boundaries
        if self.window:
            # Packed: the samples lie on a line of tokens, which is cut where a sample starts in a new window.
            #   tokens   |----a----|--b--|------c------|-d-|---e---|
            #   windows  |0            |1            |2            |      batches: a b | c | d e
            starts = np.cumsum(self.lengths[order]) - self.lengths[order]
            cuts = np.flatnonzero(np.diff(starts // self.window)) + 1
            boundaries = split_widest([0, *cuts.tolist(), len(order)], self.steps * self.processes)
        steps = np.arange(self.steps)
        if self.order == "group_by_length":
            generator.shuffle(steps[1:])
        for step in steps * self.processes + self.rank:
            yield order[boundaries[step] : boundaries[step + 1]].tolist()

    def _greedy_boundaries(self, max_tokens: int) -> list[int]:
        """Return boundaries from the longest sample to the shortest; a batch's first sample decides how many fit.

        They hold in every epoch: if no sample exceeds its largest length, neither does the n-th longest of them.
        """
        lengths, boundaries = -np.sort(-self.lengths), [0]
        while boundaries[-1] < len(lengths):
            boundaries.append(boundaries[-1] + max_tokens // int(lengths[boundaries[-1]]))
        return [*boundaries[:-1], len(lengths)]


class RepeatedBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batch sampler that yields the batches of an update several times in a row: updates on the same candidates.

    With two batches an update and two updates, the batches a b c become  a b  a b  c a  c a.  The last update of an
    epoch is completed by the epoch's first batches.

    Args:
        batches: the batches of this process.
        accumulation: number of batches of an update.
        repeats: number of updates with the same batches.
    """

    def __init__(self, batches: LengthGroupedBatchSampler, accumulation: int, repeats: int):
        self.batches, self.accumulation, self.repeats = batches, accumulation, repeats

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def stop(self) -> None:
        """Yield no more batches, see `LengthGroupedBatchSampler.stop`."""
        self.batches.stop()

    def __len__(self) -> int:
        return -(-len(self.batches) // self.accumulation) * self.accumulation * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        for start in range(0, len(batches), self.accumulation):
            update = [batches[index % len(batches)] for index in range(start, start + self.accumulation)]
            for _ in range(self.repeats):
                yield from update


def split_widest(boundaries: list[int], count: int) -> list[int]:
    """Return the boundaries of `count` batches: the batch of most samples is halved until there are enough."""
    while len(boundaries) - 1 < count:
        index = int(np.argmax(np.diff(boundaries)))
        middle = (boundaries[index] + boundaries[index + 1]) // 2
        boundaries = [*boundaries[: index + 1], middle, *boundaries[index + 1 :]]
    return boundaries
