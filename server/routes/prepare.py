"""What a request needs before it can be queued."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from molex.adapter import Adapter
from server.deps import Target
from server.engine import Engine
from server.routes.timing import Stopwatch
from server.submission import in_time

T = TypeVar("T")


async def prepare(
    engine: Engine, target: Target, watch: Stopwatch, encoding: Awaitable[T]
) -> tuple[Adapter, T]:
    """The weights of the target, and the tokens of `encoding`, which come while the weights load.

    Raises ServiceError.
    """
    load = engine.loader.begin(target.served)
    encoded = await encoding
    watch.tokenization_done()
    async with in_time(watch.deadline):
        adapter = await asyncio.shield(load)
    watch.loading_done()
    return adapter, encoded
