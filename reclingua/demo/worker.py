"""Worker thread of the demo: one request at a time, with a timeout that includes the wait."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from reclingua.utils.errors import InputError

Result = TypeVar("Result")


class Worker:
    """Single thread that computes all requests.

    Args:
        timeout: seconds that a request can take, including the wait for earlier requests.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def __call__(self, work: Callable[..., Result], *args) -> Result:
        """Compute work(*args) in the thread; InputError if it takes too long.

        After a timeout, work that is running ends in the background and its result is dropped; work that waits is
        cancelled.
        """
        future = asyncio.get_running_loop().run_in_executor(self.thread, partial(work, *args))
        try:
            return await asyncio.wait_for(future, self.timeout)
        except TimeoutError:
            raise InputError(f"no answer within {self.timeout:g} seconds; try again, or raise --timeout") from None
