"""Runs an experiment: warm-up, capacity where it is needed, then blocks of all arms in random order."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from loadtests.client import Client, Outcome, Result, connection_pool
from loadtests.config import Arm, Config
from loadtests.dialects import make_dialect
from loadtests.errors import LoadTestError
from loadtests.loops import closed_loop, open_loop
from loadtests.schedule import Planned, Traffic, poisson_arrivals

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Block:
    """An arm under load at one rate, in requests per second, for a fixed time."""

    round: int
    rate: float
    arm: str
    seconds: float
    results: Sequence[Result]

    @property
    def num_ok(self) -> int:
        return sum(result.outcome is Outcome.OK for result in self.results)


@dataclass(frozen=True)
class Run:
    """All that was measured. `capacity`: answers per second of each arm in a closed loop, if measured.

    `arms` are in the order of the configuration, `rates` ascend, `blocks` are in the order they ran.
    """

    arms: Sequence[str]
    rates: Sequence[float]
    capacity: dict[str, float]
    blocks: Sequence[Block]

    def of(self, arm: str, rate: float) -> list[Block]:
        """The blocks of an arm at a rate, by round."""
        return [block for block in self.blocks if block.arm == arm and block.rate == rate]


async def run_experiment(config: Config, texts: Sequence[str], tell: Tell) -> Run:
    """Run everything. `tell` gets a line for each step. Raises LoadTestError."""
    for arm in config.arms:
        await _warm_up(config, arm, texts, tell)
    capacity = {}
    if config.shares is not None:
        capacity = {arm.name: await _measure_capacity(config, arm, texts, tell) for arm in config.arms}
    rates = sorted(config.rates or [share * min(capacity.values()) for share in config.shares or []])
    order = block_order(config, rates)
    tell(f"{len(order)} blocks of {config.block_seconds:g} s")
    blocks = []
    for number, (round_, rate, arm) in enumerate(order, start=1):
        block = await _run_block(config, arm, texts, round_, rate)
        blocks.append(block)
        tell(f"[{number}/{len(order)}] {arm.name} at {rate:.1f}/s: {block.num_ok}/{len(block.results)} ok")
    return Run([arm.name for arm in config.arms], rates, capacity, blocks)


def block_order(config: Config, rates: Sequence[float]) -> list[tuple[int, float, Arm]]:
    """Round, rate and arm of each block.

    The rates of a round come in random order, and so do the arms at each of them. The arms of a pair that is
    compared thus run within moments of each other, under the same conditions of the machine.
    """
    rng = random.Random(config.seed)
    return [
        (round_, rate, arm)
        for round_ in range(config.rounds)
        for rate in rng.sample(rates, len(rates))
        for arm in rng.sample(config.arms, len(config.arms))
    ]


def plan_block(config: Config, arm: Arm, texts: Sequence[str], round_: int, rate: float) -> list[Planned]:
    """The requests of a block. Arms differ in nothing but the names of their models.

    Raises LoadTestError where there are more than `max_requests`.
    """
    rng = np.random.default_rng([config.seed, round_, round(rate * 1000)])
    due = poisson_arrivals(rate, config.block_seconds, rng)
    if len(due) > config.max_requests:
        raise LoadTestError(f"a block at {rate:.1f}/s has more than max_requests")
    return Traffic(texts, arm.models, config.popularity).plan(due, rng)


async def _run_block(config: Config, arm: Arm, texts: Sequence[str], round_: int, rate: float) -> Block:
    plan = plan_block(config, arm, texts, round_, rate)
    async with _client(config, arm) as client:
        results = await open_loop(client, plan)
    return Block(round_, rate, arm.name, config.block_seconds, results)


async def _warm_up(config: Config, arm: Arm, texts: Sequence[str], tell: Tell) -> None:
    """Uncounted requests. Raises LoadTestError if none is answered."""
    tell(f"warming up {arm.name}")
    results = await _saturate(config, arm, texts, config.warmup_seconds)
    if all(result.outcome is not Outcome.OK for result in results):
        first = results[0]
        raise LoadTestError(
            f"{arm.name}: {arm.url} answered none of {len(results)} requests; "
            f"the first: {first.outcome}{f' {first.status}' if first.status else ''}"
        )


async def _measure_capacity(config: Config, arm: Arm, texts: Sequence[str], tell: Tell) -> float:
    """Answers per second while `num_clients` requests are always in flight."""
    results = await _saturate(config, arm, texts, config.block_seconds)
    num_ok = sum(result.outcome is Outcome.OK for result in results)
    if not num_ok:
        raise LoadTestError(f"{arm.name}: no request was answered while its capacity was measured")
    capacity = num_ok / max(result.end for result in results)
    tell(f"capacity of {arm.name}: {capacity:.1f}/s")
    return capacity


async def _saturate(config: Config, arm: Arm, texts: Sequence[str], seconds: float) -> list[Result]:
    traffic = Traffic(texts, arm.models, config.popularity)
    plan = traffic.plan(np.zeros(config.max_requests), np.random.default_rng(config.seed))
    async with _client(config, arm) as client:
        return await closed_loop(client, plan, config.num_clients, seconds)


@asynccontextmanager
async def _client(config: Config, arm: Arm) -> AsyncIterator[Client]:
    async with connection_pool(arm.url) as http:
        yield Client(http, make_dialect(arm.dialect, arm.max_tokens), config.timeout_seconds)
