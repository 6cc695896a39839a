"""Threads for what blocks, so that the event loop never does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from molex.threads import release_helpers

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """Some threads, called from the event loop."""

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `function`, which runs on one of the threads."""

        def call() -> T:
            try:
                return function(*args, **kwargs)
            finally:
                release_helpers()

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        """Wait for what runs and drop what waits."""
        self._executor.shutdown(cancel_futures=True)

    def abandon(self) -> None:
        """Drop what waits, and leave what runs to its own end."""
        self._executor.shutdown(wait=False, cancel_futures=True)
