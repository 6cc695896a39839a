"""What a handler holds while its sequences run, and how long it waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager

from server.errors import deadline_error
from server.sequence import Sequence, Update


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """What is waited for ends at `deadline`, on the event loop's clock. Raises ServiceError (504) then."""
    try:
        async with asyncio.timeout_at(deadline) as timeout:
            yield
    except TimeoutError:
        if timeout.expired():
            raise deadline_error() from None
        raise


class Submission:
    """The sequences of one request on their way, as its handler sees them."""

    def __init__(self, sequences: Seq[Sequence], cancel: Callable[[Seq[Sequence]], None]) -> None:
        self.sequences = sequences
        self._cancel = cancel
        self._updates: deque[Update] = deque()
        self._news, self._ended = asyncio.Event(), asyncio.Event()
        self._unfinished = len(sequences)
        self._timer: asyncio.TimerHandle | None = None
        for sequence in sequences:
            sequence.sink = self._receive

    def _receive(self, update: Update) -> None:
        self._updates.append(update)
        self._news.set()
        self._unfinished -= update.last
        if update.error is not None or not self._unfinished:
            self._ended.set()

    def expire_at(self, deadline: float) -> None:
        """Fail what has not ended at `deadline`, on the clock of the event loop.

        A timer of its own, because a handler may not be waiting: its client may be slow to read a stream.
        """
        self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._receive(Update(self.sequences[0], error=deadline_error()))
        self._cancel(self.sequences)

    async def updates(self) -> AsyncIterator[Update]:
        """Updates of all the sequences as they come. Raises the first failure, a ServiceError."""
        remaining = len(self.sequences)
        while remaining:
            while not self._updates:
                self._news.clear()
                await self._news.wait()
            update = self._updates.popleft()
            if update.error is not None:
                raise update.error
            remaining -= update.last
            yield update

    async def finished(self) -> list[Update]:
        """All updates, once every sequence has ended. The task sleeps until then.

        Were it woken for each token, a step of many generations would keep the event loop, and through the
        interpreter's lock the worker, busy for a while.
        """
        await self._ended.wait()
        return [update async for update in self.updates()]

    def cancel(self) -> None:
        """Drop what has not ended: nobody waits for it any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._cancel(self.sequences)
