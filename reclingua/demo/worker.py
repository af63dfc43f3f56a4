"""The model answers one request after another, and nobody waits for ever."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from reclingua.utils.errors import InputError

Result = TypeVar("Result")


class Worker:
    """One thread that does the work of all requests.

    Args:
        seconds: that a request may take, waiting for the one before it included.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def __call__(self, work: Callable[..., Result], *args) -> Result:
        """work(*args), computed in the thread; InputError if that takes too long.

        Work that has begun goes on, since nothing can stop it, and its result is dropped; work that has not is not
        begun any more.
        """
        doing = asyncio.get_running_loop().run_in_executor(self.thread, partial(work, *args))
        try:
            return await asyncio.wait_for(doing, self.seconds)
        except TimeoutError:
            raise InputError(f"no answer within {self.seconds:g} seconds; try again, or see --timeout") from None
