"""What a request needs before it can be queued."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from molex.adapter import Adapter
from server.deps import Target
from server.engine import Engine
from server.routes.timing import Stopwatch
from server.submission import in_time

P = ParamSpec("P")
T = TypeVar("T")


async def prepare(
    engine: Engine,
    target: Target,
    watch: Stopwatch,
    encode: Callable[P, T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> tuple[Adapter, T]:
    """The weights of the target, and what `encode` makes on a pool thread while they load, if they have to.

    Raises ServiceError.
    """
    load = engine.loader.begin(target.served)
    encoded = await engine.in_pool(watch.deadline, encode, *args, **kwargs)
    watch.tokenization_done()
    async with in_time(watch.deadline):
        adapter = await asyncio.shield(load)
    watch.loading_done()
    return adapter, encoded
