"""What one tenant's flood does to the latency of another.

    python -m benchmarks.bench_fairness [--rounds 8] [--block-seconds 5] [--kinds classification generation]

One `molex serve` with API keys for two tenants. The light one's requests arrive as a Poisson process; its
times count from when a request was due. The other floods: callers that always have a request under way, for
classification of 8 texts each, so that much waits and sending it costs the client little. Blocks of three
kinds come in random order in each round: the light tenant alone, the same arrivals beside the flood, and the
flood alone, which has all of the server.

The client runs on the same CPUs as the server.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.common import DEMO_ENCODER, PROJECT, behave_as_the_server, command_line
from benchmarks.figures import Figure, save
from benchmarks.served import TEXTS, own_server
from loadtests.client import Client, Outcome, Result, connection_pool
from loadtests.dialects import Results, StreamedCompletion
from loadtests.latency import METRICS, PERCENTILES, percentiles
from loadtests.loops import closed_loop, open_loop
from loadtests.schedule import Planned, Traffic, poisson_arrivals
from loadtests.texts import read_texts
from server.catalogue.catalogue import Catalogue
from server.catalogue.database import migrate
from server.catalogue.records import Scope
from server.catalogue.url import parse_url

ADAPTERS = PROJECT / "examples" / "adapters"
DEMO_DECODER = PROJECT / ".models" / "smollm2-135m-instruct"
TIMEOUT_SECONDS = 60
BOUND = 2
ENOUGH = 100
"""The 99th percentile of fewer requests is the slowest of them: their ratio is held to nothing."""
PEPPER = "a pepper for this benchmark alone"
SCRIPT = "bench_fairness"
QUIET, BESIDE, FLOOD = "light tenant alone", "beside the flood", "flood alone"


@dataclass(frozen=True)
class Kind:
    """One kind of work: the base, the adapter, what is sent. `texts`: how many a request of the flood has."""

    base: Path
    adapter: str
    rate: float
    max_tokens: int | None
    texts: int
    callers: int

    def dialect(self, texts: int = 1) -> Results | StreamedCompletion:
        if self.max_tokens is not None:
            return StreamedCompletion(self.max_tokens)
        return Results("/v1/classify", lambda result: "label" in result, num_texts=texts)


KINDS = {
    "classification": Kind(DEMO_ENCODER, "sst2-molex", 20, None, texts=8, callers=8),
    "generation": Kind(DEMO_DECODER, "e2e-molex", 1, 16, texts=1, callers=24),
}


@dataclass
class Blocks:
    """The results of all blocks of one kind."""

    light: list[float] = field(default_factory=list)
    """Seconds from due to done."""
    flood: list[float] = field(default_factory=list)
    """Texts a second, by block."""


@dataclass(frozen=True)
class Experiment:
    kind: Kind
    light: httpx.AsyncClient
    flood: httpx.AsyncClient
    plan: Traffic
    seconds: float

    async def run_block(self, name: str, seed: int, blocks: Blocks) -> None:
        rng = np.random.default_rng(seed)
        arrivals = self.plan.plan(poisson_arrivals(self.kind.rate, self.seconds, rng), rng)
        async with asyncio.TaskGroup() as group:
            flooding = None if name == QUIET else group.create_task(self._flood(rng))
            light = group.create_task(self._arrive([] if name == FLOOD else arrivals))
        blocks.light += [METRICS["total"](result)[0] for result in light.result()]
        if flooding is not None:
            texts = self.kind.texts * len(flooding.result())
            blocks.flood.append(texts / max(result.end for result in flooding.result()))

    async def _arrive(self, arrivals: Sequence[Planned]) -> list[Result]:
        return checked(await open_loop(Client(self.light, self.kind.dialect(), TIMEOUT_SECONDS), arrivals))

    async def _flood(self, rng: np.random.Generator) -> list[Result]:
        single = self.plan.plan(np.zeros(20_000), rng)
        requests = [
            Planned(0, some[0].model, "\n".join(planned.text for planned in some))
            for some in (single[i : i + self.kind.texts] for i in range(0, len(single), self.kind.texts))
        ]
        client = Client(self.flood, self.kind.dialect(self.kind.texts), TIMEOUT_SECONDS)
        return checked(await closed_loop(client, requests, self.kind.callers, self.seconds))


def checked(results: list[Result]) -> list[Result]:
    """Raises ValueError where a request failed: refusing is no way to be quick."""
    for result in results:
        if result.outcome is not Outcome.OK:
            raise ValueError(f"{result.outcome}, status {result.status}")
    return results


async def make_keys(database: str) -> dict[str, str]:
    """An API key for each of the two tenants."""
    catalogue = Catalogue(parse_url(database), PEPPER)
    keys = {}
    for tenant in ("light", "flood"):
        await catalogue.set_tenant(tenant, {}, actor=SCRIPT)
        _, keys[tenant] = await catalogue.create_key(tenant, frozenset({Scope.INFER}), actor=SCRIPT)
    await catalogue.close()
    return keys


async def measure(
    url: str, keys: dict[str, str], kind: Kind, seconds: float, rounds: int
) -> dict[str, Blocks]:
    """Every round has a block of each kind; the light tenant's have the same arrivals. The first warms up."""
    blocks = {name: Blocks() for name in (QUIET, BESIDE, FLOOD)}
    order = random.Random(0)
    async with AsyncExitStack() as stack:
        pools = {tenant: await stack.enter_async_context(connection_pool(url)) for tenant in keys}
        for tenant, pool in pools.items():
            pool.headers["authorization"] = f"Bearer {keys[tenant]}"
        traffic = Traffic(read_texts(TEXTS), [kind.adapter], "uniform")
        experiment = Experiment(kind, pools["light"], pools["flood"], traffic, seconds)
        for number in range(rounds + 1):
            for name in order.sample(list(blocks), len(blocks)):
                await experiment.run_block(name, number, blocks[name] if number else Blocks())
    return blocks


def run_kind(kind: Kind, options: Sequence[str], seconds: float, rounds: int) -> dict[str, Blocks]:
    with tempfile.TemporaryDirectory() as scratch:
        database = f"sqlite:///{scratch}/catalogue.db"
        migrate(parse_url(database))
        keys = asyncio.run(make_keys(database))
        os.environ["MOLEX_PEPPER"] = PEPPER
        options = [*options, "--database", database]
        with own_server(kind.base, ADAPTERS, Path(scratch) / "server.log", *options) as url:
            return asyncio.run(measure(url, keys, kind, seconds, rounds))


def figures_of(name: str, blocks: dict[str, Blocks], setting: str) -> list[Figure]:
    points = {block: percentiles(np.array(blocks[block].light)) * 1e3 for block in (QUIET, BESIDE)}
    p50, p99 = PERCENTILES.index(50), PERCENTILES.index(99)
    measured = {f"p50, {block}, ms": float(values[p50]) for block, values in points.items()}
    measured |= {f"p99, {block}, ms": float(values[p99]) for block, values in points.items()}
    rates = {f"texts/s, {block}": float(np.median(blocks[block].flood)) for block in (BESIDE, FLOOD)}
    count = len(blocks[QUIET].light)
    what = f"p99 of {count} requests for {name}, {BESIDE} / {QUIET}, {setting}"
    ratio = float(points[BESIDE][p99] / points[QUIET][p99])
    bound = BOUND if count >= ENOUGH else None
    kept = rates[f"texts/s, {BESIDE}"] / rates[f"texts/s, {FLOOD}"]
    return [
        Figure("P13", what, ratio, bound, at_least=False, unit="x", measured=measured),
        Figure(
            "P13",
            f"what the flood gets, {BESIDE} of {FLOOD}, {name}, {setting}",
            kept,
            None,
            at_least=True,
            unit="x",
            measured=rates,
        ),
    ]


def main() -> None:
    parser = command_line(__doc__, rounds=8)
    parser.add_argument("--block-seconds", type=float, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--precision", default="fp32", help="as of molex serve")
    arguments = parser.parse_args()
    behave_as_the_server()
    figures = []
    for name in arguments.kinds:
        options = ["--precision", arguments.precision]
        blocks = run_kind(KINDS[name], options, arguments.block_seconds, arguments.rounds)
        figures += figures_of(name, blocks, arguments.precision)
    save(figures, SCRIPT, arguments.output)


if __name__ == "__main__":
    main()
