"""Dynamic batching: requests that wait are computed together, by the one thread that uses the models."""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from reclingua.serving.metrics import Metrics

Compute = Callable[[list[Any]], list[Any]]  # payloads of a batch -> their results


class QueueFullError(Exception):
    """The queue has no room for a request; `retry_after` is the number of seconds after which it can have some."""

    def __init__(self, retry_after: int):
        super().__init__("the queue is full")
        self.retry_after = retry_after


@dataclass(eq=False)
class QueuedRequest:
    """A request that waits for its batch.

    Args:
        compute: the function that computes it; requests with the same one can share a batch.
        size: rows that the payload has in a batch.
        result: what `compute` returns for the payload; cancelled if the request was given up.
        arrived: time of the event loop, seconds.
    """

    compute: Compute
    payload: Any
    size: int
    result: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    arrived: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class BatchQueue:
    """Bounded queue of requests, oldest first, and the thread that computes them batch by batch.

    Args:
        max_batch: largest number of rows of a batch, unless a single request has more.
        max_wait: seconds that a request waits for others while the thread is idle.
        max_queue: largest number of requests that wait.
    """

    def __init__(self, max_batch: int, max_wait: float, max_queue: int, metrics: Metrics):
        self.max_batch, self.max_wait, self.max_queue, self.metrics = max_batch, max_wait, max_queue, metrics
        self._waiting: list[QueuedRequest] = []
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._batch_seconds = 0.0  # of the last batch

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self.max_queue

    async def submit(self, compute: Compute, payload: Any, size: int = 1) -> Any:
        """Return the result that `compute` has for `payload`, in a batch with others.

        A request whose task is cancelled leaves the queue, and is not computed unless its batch runs already.

        Args:
            size: rows of the payload in a batch.

        Raises:
            QueueFullError: too many requests wait.
            Exception: what `compute` raised for this payload.
        """
        if self.is_full:
            batches = len(self._waiting) / self.max_batch
            raise QueueFullError(max(1, math.ceil(batches * self._batch_seconds)))
        request = QueuedRequest(compute, payload, size)
        self._waiting.append(request)
        self._changed()
        try:
            return await request.result
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
                self._changed()

    async def run_alone(self, work: Callable[[], Any]) -> Any:
        """Return work(), computed by the thread between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run(self) -> None:
        """Compute batches until the task is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_batch()
            batch = self._take_batch()
            started = time.perf_counter()
            payloads = [request.payload for request in batch]
            results = await loop.run_in_executor(self._thread, compute_batch, batch[0].compute, payloads)
            self._batch_seconds = time.perf_counter() - started
            self.metrics.batch_seconds.observe(self._batch_seconds)
            self.metrics.batch_rows.observe(sum(request.size for request in batch))
            for request, result in zip(batch, results, strict=True):
                if request.result.done():
                    continue
                if isinstance(result, Exception):
                    request.result.set_exception(result)
                else:
                    request.result.set_result(result)

    def close(self) -> None:
        """Let the thread end after its batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _changed(self) -> None:
        self.metrics.queue_length.set(len(self._waiting))
        self._arrival.set()

    async def _wait_for_batch(self) -> None:
        """Return when a batch is full, or its oldest request has waited for `max_wait` seconds."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrival.clear()
            left = self._waiting[0].arrived + self.max_wait - loop.time() if self._waiting else None
            if self._waiting and (left is None or left <= 0 or self._rows_of_oldest() >= self.max_batch):
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrival.wait()

    def _rows_of_oldest(self) -> int:
        """Return the rows of all requests that can share a batch with the oldest one."""
        return sum(request.size for request in self._waiting if request.compute == self._waiting[0].compute)

    def _take_batch(self) -> list[QueuedRequest]:
        """Remove the oldest request from the queue, with those that can share its batch, and return them."""
        batch: list[QueuedRequest] = []
        rows = 0
        for request in self._waiting:
            if request.compute == self._waiting[0].compute and (not batch or rows + request.size <= self.max_batch):
                batch.append(request)
                rows += request.size
        self._waiting = [request for request in self._waiting if request not in batch]
        self._changed()
        return batch


def compute_batch(compute: Compute, payloads: list[Any]) -> list[Any]:
    """Return the result of each payload, or its exception; a batch that fails is computed one by one."""
    try:
        return compute(payloads)
    except Exception as error:
        if len(payloads) == 1:
            return [error]
        return [result for payload in payloads for result in compute_batch(compute, [payload])]
