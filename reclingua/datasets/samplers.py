"""Which samples make a batch: of one length together, or laid end to end, by number or by tokens."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from reclingua.utils.errors import InputError

ORDERS = ("group_by_length", "random", "sequential")


class LengthGroupedBatchSampler(torch.utils.data.Sampler[list[int]]):
    """The batches of one process. Every sample is in one batch of one process in each epoch, every epoch has the same
    number of batches, and every process as many as the others (for which, where batches are single samples, some
    samples are taken twice).

    Args:
        lengths: tokens of each sample at most.
        now: gives the tokens of each sample in an epoch, by which they are sorted (default: `lengths`).
        batch_size: samples of a batch at most; ignored where `max_tokens` is given.
        max_tokens: tokens of a batch at most; padding counts, unless the samples are `packed`.
        packed: whether samples are laid end to end without padding.
        order: "group_by_length": the samples by length (equal ones shuffled), the batches shuffled; the longest come
            first, so that too little memory shows at once. "random" or "sequential": the samples.
        rank, processes: the batches that all processes take at the same time are neighbours in length.

    Raises:
        InputError: a sample has more tokens than a batch may have.
    """

    def __init__(
        self,
        lengths: Sequence[int],
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
        self.order, self.seed, self.epoch, self.over = order, seed, 0, False
        self.rank, self.processes = rank, processes
        self.window = 0.0  # tokens of a packed batch, about
        samples, longest, tokens = len(self.lengths), int(self.lengths.max()), int(self.lengths.sum())
        if max_tokens and not packed and order != "group_by_length":
            raise InputError(
                "--max_tokens_per_batch needs --packing or --train_sampling_strategy group_by_length: "
                "in another order padding decides how many samples fit"
            )
        if max_tokens and max_tokens < (least := 2 * longest if packed else longest):
            raise InputError(
                f"--max_tokens_per_batch {max_tokens}: should be {least} at least, since a sample has up to {longest} "
                f"tokens{' and packing needs room for two' if packed else ''}; or lower --max_his_len"
            )
        self.boundaries = [0, samples]  # where a batch ends and the next begins
        if not max_tokens:
            count = -(-samples // batch_size)
        elif packed:
            # A batch has the samples that begin within its share of all tokens: one sample more than that at most.
            count = -(-tokens // (max_tokens - longest + 1))
        else:
            self.boundaries = self._filled(max_tokens)
            count = len(self.boundaries) - 1
        self.steps = -(-count // processes)
        count = self.steps * processes
        self.taken = max(samples, count)
        if not max_tokens or samples < count:
            self.boundaries = np.linspace(0, self.taken, count + 1).astype(int).tolist()
        elif packed:
            self.window = tokens / count
        else:
            self.boundaries = split_widest(self.boundaries, count)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def stop(self) -> None:
        """From now on there are none: training that goes on from its last step has nothing left to do."""
        self.over = True

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        if self.over:
            return
        draw = np.random.default_rng((self.seed, self.epoch))
        order = np.arange(len(self.lengths))
        if self.order != "sequential":
            draw.shuffle(order)
        if self.order == "group_by_length":
            order = order[np.argsort(-self.epoch_lengths()[order], kind="stable")]
        order = np.resize(order, self.taken)
        boundaries = self.boundaries
        if self.window:
            starts = np.cumsum(self.lengths[order]) - self.lengths[order]
            cuts = np.flatnonzero(np.diff(starts // self.window)) + 1
            boundaries = split_widest([0, *cuts.tolist(), len(order)], self.steps * self.processes)
        steps = np.arange(self.steps)
        if self.order == "group_by_length":
            draw.shuffle(steps[1:])
        for step in steps * self.processes + self.rank:
            yield order[boundaries[step] : boundaries[step + 1]].tolist()

    def _filled(self, max_tokens: int) -> list[int]:
        """Borders from the longest sample to the shortest: as many to a batch as its first one leaves room for.

        They hold in every epoch: if no sample is longer than it may be, neither is the n-th longest of them.
        """
        lengths, boundaries = -np.sort(-self.lengths), [0]
        while boundaries[-1] < len(lengths):
            boundaries.append(boundaries[-1] + max_tokens // int(lengths[boundaries[-1]]))
        return [*boundaries[:-1], len(lengths)]


def split_widest(boundaries: list[int], count: int) -> list[int]:
    """The borders of `count` batches: those given, and the batch of most samples halved until there are enough."""
    while len(boundaries) - 1 < count:
        at = int(np.argmax(np.diff(boundaries)))
        boundaries = [*boundaries[: at + 1], (boundaries[at] + boundaries[at + 1]) // 2, *boundaries[at + 1 :]]
    return boundaries
