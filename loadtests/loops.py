"""Open-loop and closed-loop load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loadtests.client import Client, Result
from loadtests.schedule import Planned


async def open_loop(client: Client, plan: Sequence[Planned]) -> list[Result]:
    """Send each request when it is due, whether or not earlier ones have come back.

    Returns one result for each request, in order. It ends one timeout after the last due time at the latest.
    """
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for planned in plan:
            await asyncio.sleep(start + planned.due - time.perf_counter())
            tasks.append(group.create_task(client.send(planned, start)))
    return [task.result() for task in tasks]


async def closed_loop(
    client: Client, plan: Sequence[Planned], num_clients: int, seconds: float
) -> list[Result]:
    """`num_clients` callers send one request after the other until `seconds` have passed or the plan ends.

    Here a request is due when its caller is ready for it. Returns results in the order they came.
    """
    start = time.perf_counter()
    waiting = iter(plan)
    results: list[Result] = []

    async def caller(requests: Iterator[Planned]) -> None:
        for planned in requests:
            now = time.perf_counter() - start
            if now >= seconds:
                return
            results.append(await client.send(replace(planned, due=now), start))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(caller(waiting))
    return results
