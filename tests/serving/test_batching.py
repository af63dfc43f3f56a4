"""Batches of requests: which share one, and what happens to those that are given up, fail, or are too many."""

import asyncio
import time

import pytest

from reclingua.serving.batching import BatchQueue, QueueFullError
from reclingua.serving.metrics import Metrics


class Log:
    """A computation that notes its batches; "fail" fails, "wait" takes a while."""

    def __init__(self):
        self.batches = []

    def double(self, payloads):
        self.batches.append(list(payloads))
        if "fail" in payloads:
            raise ValueError("fail")
        if "wait" in payloads:
            time.sleep(0.1)
        return [payload * 2 for payload in payloads]

    def length(self, payloads):
        self.batches.append(list(payloads))
        return [len(payload) for payload in payloads]


def with_queue(test, max_batch=4, max_wait=0.05, max_queue=10):
    """Run test(queue, log) beside the queue's own task; returns the log."""
    log = Log()

    async def run():
        queue = BatchQueue(max_batch, max_wait, max_queue, Metrics())
        task = asyncio.create_task(queue.run())
        try:
            async with asyncio.timeout(5):
                await test(queue, log)
        finally:
            task.cancel()
            queue.close()

    asyncio.run(run())
    return log


def test_requests_share_batches_of_their_computation():
    async def test(queue, log):
        asked = [queue.submit(log.double, letter) for letter in "abcdef"]
        asked.insert(1, queue.submit(log.length, "xyz"))
        assert await asyncio.gather(*asked) == ["aa", 3, "bb", "cc", "dd", "ee", "ff"]

    assert with_queue(test).batches == [["a", "b", "c", "d"], ["xyz"], ["e", "f"]]


def test_rows_count_and_a_large_request_is_alone():
    async def test(queue, log):
        sizes = {"a": 3, "b": 2, "c": 1, "d": 9, "e": 1}
        results = await asyncio.gather(*(queue.submit(log.double, name, size) for name, size in sizes.items()))
        assert results == ["aa", "bb", "cc", "dd", "ee"]

    assert with_queue(test).batches == [["a", "c"], ["b", "e"], ["d"]]


def test_a_full_batch_starts_at_once_and_a_small_one_after_max_wait():
    async def test(queue, log):
        started = time.monotonic()
        await asyncio.gather(*(queue.submit(log.double, letter) for letter in "abcd"))
        assert time.monotonic() - started < 0.3
        started = time.monotonic()
        await queue.submit(log.double, "e")
        assert time.monotonic() - started >= 0.4

    assert with_queue(test, max_wait=0.4).batches == [["a", "b", "c", "d"], ["e"]]


def test_what_is_given_up_is_not_computed():
    async def test(queue, log):
        running = asyncio.create_task(queue.submit(log.double, "wait"))
        await asyncio.sleep(0.02)
        others = [asyncio.create_task(queue.submit(log.double, letter)) for letter in "ab"]
        await asyncio.sleep(0.02)
        others[0].cancel()
        running.cancel()  # computed already, and ends without an error
        assert await others[1] == "bb" and others[0].cancelled()
        assert queue.metrics.registry.get_sample_value("reclingua_queue_length") == 0

    assert with_queue(test, max_wait=0).batches == [["wait"], ["b"]]


def test_a_request_that_fails_fails_alone():
    async def test(queue, log):
        names = ("a", "fail", "b")
        results = await asyncio.gather(*(queue.submit(log.double, name) for name in names), return_exceptions=True)
        assert results[0] == "aa" and results[2] == "bb" and isinstance(results[1], ValueError)
        assert await queue.submit(log.double, "c") == "cc"

    with_queue(test)


def test_a_full_queue_refuses():
    async def test(queue, log):
        running = asyncio.create_task(queue.submit(log.double, "wait"))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(queue.submit(log.double, letter)) for letter in "ab"]
        await asyncio.sleep(0)
        assert queue.is_full
        with pytest.raises(QueueFullError) as error:
            await queue.submit(log.double, "c")
        assert error.value.retry_after >= 1
        assert await asyncio.gather(running, *waiting) == ["waitwait", "aa", "bb"] and not queue.is_full

    with_queue(test, max_wait=0, max_queue=2)


def test_work_alone_is_between_batches():
    async def test(queue, log):
        running = asyncio.create_task(queue.submit(log.double, "wait"))
        await asyncio.sleep(0.02)
        assert await queue.run_alone(lambda: len(log.batches)) == 1
        assert running.done() or await running

    with_queue(test, max_wait=0)
