"""Brings the weights of evicted adapters back: one read for all requests that ask, beside everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter
from typing import ParamSpec, TypeVar

from molex.adapter import BARE, Adapter
from server.adapters import AdapterStore
from server.errors import ErrorKind, ServiceError
from server.metrics import Metrics
from server.pool import Pool
from server.served import ServedAdapter

P = ParamSpec("P")
T = TypeVar("T")

ROOM_SECONDS = 10
"""How long a load waits for requests on other adapters to end and leave their room."""
POLL_SECONDS = 0.005


class Loader:
    """Loads on threads of its own: slow reads hold up no tokenization. Used on the event loop alone."""

    def __init__(self, adapters: AdapterStore, metrics: Metrics, *, threads: int) -> None:
        self._adapters = adapters
        self._metrics = metrics
        self._pool = Pool(threads, "loader")
        self._loads: dict[ServedAdapter, asyncio.Task[Adapter]] = {}
        self.restore: Callable[[ServedAdapter], Awaitable[None]] = _is_there
        """Brings the files of an adapter back to the disk, if they have left it."""
        self._turn = asyncio.Lock()

    def begin(self, served: ServedAdapter | None) -> asyncio.Future[Adapter]:
        """The weights of an adapter, now or later; None is the bare base.

        A load that has begun goes on when the request that wanted it is gone. To be awaited through
        `asyncio.shield`, since others may wait for the same. Raises ServiceError when awaited.
        """
        weights = BARE if served is None else self._adapters.weights(served)
        if weights is not None:
            done = asyncio.get_running_loop().create_future()
            done.set_result(weights)
            return done
        assert served is not None
        if served not in self._loads:
            self._loads[served] = asyncio.create_task(self._load(served))
            self._loads[served].add_done_callback(lambda load: self._end(served, load))
        return self._loads[served]

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what reads adapters on one of the threads."""
        return await self._pool.run(function, *args, **kwargs)

    async def settled(self, served: Iterable[ServedAdapter]) -> None:
        """Wait for the loads of some adapters that are under way."""
        loads = [self._loads[one] for one in served if one in self._loads]
        await asyncio.gather(*map(asyncio.shield, loads), return_exceptions=True)

    def close(self) -> None:
        self._pool.close()

    async def _load(self, served: ServedAdapter) -> Adapter:
        begun = perf_counter()
        result = "failed"
        try:
            await self.restore(served)
            await self._room_for(served)
            adapter = await self.run(self._adapters.read_again, served)
            result = "loaded"
        finally:
            self._metrics.cold_load(served.base, result, perf_counter() - begun)
        return adapter

    def _end(self, served: ServedAdapter, load: asyncio.Task[Adapter]) -> None:
        del self._loads[served]
        if not load.cancelled():
            load.exception()  # Nobody may be left to look at it, which asyncio would complain about.

    async def _room_for(self, served: ServedAdapter) -> None:
        """Wait for room in memory, first come first served. Raises ServiceError (429) if it takes long."""
        try:
            async with asyncio.timeout(ROOM_SECONDS), self._turn:
                # The requests that leave room end on the worker, which knows nothing of loads.
                while not self._adapters.reserve(served):
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as error:
            message = f"no room in memory for the adapter {served.name!r}: requests use all that are there"
            raise ServiceError(ErrorKind.OVERLOADED, message, retry_after=1) from error


async def _is_there(_: ServedAdapter) -> None:
    """For adapters that are read in place."""
