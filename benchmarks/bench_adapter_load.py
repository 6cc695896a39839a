"""How long a cold adapter takes to load over HTTP, and what loads cost the requests beside them.

    python -m benchmarks.bench_adapter_load [--rounds 10] [--block-seconds 10] [--dtypes float32 bfloat16]
                                            [--rate 20] [--loads 20]

For each precision, one `molex serve` of the demo encoder. Its neighbours are classifications of 5 pinned
adapters, which arrive as a Poisson process. Blocks come in random order in each round: the neighbours
alone; beside 20 loads a second; beside 20 classifications a second, each of an adapter that is registered
and was evicted; beside as many of adapters that are in memory; the loads and the first requests alone; and
of a load nothing but what it writes to the disk, without a server. All times count from when a request was
due, so that a queue shows in them. A load is `PUT /v1/adapters/{name}`. Adapters to load or to bring back
are neither in the memory of the server nor, after `posix_fadvise`, in the page cache of the operating
system. They are random rank-8 MoLEx adapters of 1.2 MB.

The client runs on the same CPUs as the server: what it takes to send the loads is in the neighbours' times.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np

from benchmarks.common import (
    DEMO_ENCODER,
    DTYPES,
    PROJECT,
    behave_as_the_server,
    command_line,
)
from benchmarks.figures import Figure, save
from benchmarks.served import BASE, PRECISIONS, TEXTS, own_server, write_random_adapters
from loadtests.client import Client, connection_pool
from loadtests.dialects import make_dialect
from loadtests.latency import METRICS, PERCENTILES, percentiles
from loadtests.loops import open_loop
from loadtests.schedule import Planned, Traffic, poisson_arrivals
from loadtests.texts import read_texts
from molex.adapter_file import read_files
from server.registry.storage import Storage

RESIDENT = [f"resident-{number}" for number in range(5)]
RUNS = PROJECT / "runs"
"""Where adapters are written to: /tmp may be memory, and they are to come from a disk."""
TIMEOUT_SECONDS = 30
Act = Callable[["Experiment", httpx.AsyncClient, str], Awaitable[None]]
"""What is done with an adapter when it is due."""
LOAD_BOUND = 50
NEIGHBOUR_BOUND = 1.1

ROOM = 64
"""Places in memory: for the pinned adapters and some of those that are loaded."""
FEW = 40
"""So many adapters all stay in memory."""


@dataclass(frozen=True)
class Kind:
    """What a block has: neighbours or not, and what is done, if anything, with adapters when they are due."""

    neighbours: bool
    act: Act | None = None
    few: bool = False
    """Whether the adapters are few, so that they stay in memory."""


@dataclass
class Times:
    """Seconds from due to done, of all blocks of one kind."""

    neighbours: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """Adapters to load are in `root`/cold; `due` says when in a block each of them is loaded, in seconds."""

    url: str
    root: Path
    due: Sequence[float]
    disk: Storage
    """As the server has one, for what is written without it."""

    async def pin_residents(self) -> None:
        async with connection_pool(self.url) as http:
            for name in RESIDENT:
                body = {"source": f"resident/{name}", "base": BASE, "pinned": True}
                (await http.put(f"/v1/adapters/{name}?wait=60", json=body)).raise_for_status()

    async def run_block(self, kind: Kind, plan: Sequence[Planned], times: Times) -> None:
        """Send the requests of `plan` and act on adapters, as the kind has it; then forget these."""
        count = len(self.due) if kind.act else 0
        names = [f"cold-{number % FEW if kind.few else number}" for number in range(count)]
        async with connection_pool(self.url) as http:
            if kind.act is first_request:
                for name in dict.fromkeys(names):
                    await load(self, http, name)
            acts = [partial(kind.act, self, http, name) for name in names] if kind.act else []
            drop_from_page_cache(self.root)
            client = Client(http, make_dialect("molex-classify", None), TIMEOUT_SECONDS)
            async with asyncio.TaskGroup() as group:
                neighbours = group.create_task(open_loop(client, plan if kind.neighbours else []))
                acting = group.create_task(self._when_due(acts))
            times.neighbours += [METRICS["total"](result)[0] for result in neighbours.result()]
            times.loads += acting.result()
            if kind.act is not store:
                for name in dict.fromkeys(names):
                    (await http.delete(f"/v1/adapters/{name}")).raise_for_status()
        self.disk.keep_only(())

    async def _when_due(self, acts: Sequence[Callable[[], Awaitable[None]]]) -> list[float]:
        """Seconds from due to done of each."""
        start = time.perf_counter()

        async def timed(act: Callable[[], Awaitable[None]], due: float) -> float:
            await act()
            return time.perf_counter() - due

        tasks = []
        async with asyncio.TaskGroup() as group:
            for act, due in zip(acts, self.due[: len(acts)], strict=True):
                await asyncio.sleep(start + due - time.perf_counter())
                tasks.append(group.create_task(timed(act, start + due)))
        return [task.result() for task in tasks]


async def load(_: Experiment, http: httpx.AsyncClient, name: str) -> None:
    response = await http.put(f"/v1/adapters/{name}?wait=60", json={"source": f"cold/{name}", "base": BASE})
    expect(response, httpx.codes.CREATED)


async def first_request(_: Experiment, http: httpx.AsyncClient, name: str) -> None:
    body = {"model": name, "input": "A warm, funny and beautifully acted film."}
    expect(await http.post("/v1/classify", json=body), httpx.codes.OK)


async def store(experiment: Experiment, _: httpx.AsyncClient, name: str) -> None:
    await asyncio.to_thread(lambda: experiment.disk.put(read_files(experiment.root / "cold" / name)))


def expect(response: httpx.Response, status: int) -> None:
    if response.status_code != status:
        raise RuntimeError(f"{response.url}: status {response.status_code}: {response.text}")


QUIET, BESIDE_LOADS = "neighbours alone", "neighbours beside loads"
BESIDE_FIRST = "neighbours beside first requests of evicted adapters"
BESIDE_MORE = "neighbours beside as many requests of adapters in memory"
LOADS, FIRST = "loads alone", "first requests of evicted adapters alone"
DISK = "their files written and synced, without a server"
KINDS = {
    QUIET: Kind(neighbours=True),
    BESIDE_LOADS: Kind(neighbours=True, act=load),
    BESIDE_FIRST: Kind(neighbours=True, act=first_request),
    BESIDE_MORE: Kind(neighbours=True, act=first_request, few=True),
    LOADS: Kind(neighbours=False, act=load),
    FIRST: Kind(neighbours=False, act=first_request),
    DISK: Kind(neighbours=False, act=store),
}


def write_adapters(root: Path, count: int) -> None:
    """The resident adapters in `root`/resident, and `count` others in `root`/cold."""
    folders = [root / "resident" / name for name in RESIDENT]
    write_random_adapters([*folders, *(root / "cold" / f"cold-{number}" for number in range(count))])


def drop_from_page_cache(root: Path) -> None:
    """Every adapter below a folder, that of the server's own copies too."""
    for path in root.rglob("adapter_*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def measure_blocks(
    experiment: Experiment, rate: float, seconds: float, rounds: int
) -> dict[str, Times]:
    """Every round has a block of each kind; those with neighbours have the same arrivals."""
    await experiment.pin_residents()
    traffic = Traffic(read_texts(TEXTS), RESIDENT, "zipf:1")
    times = {kind: Times() for kind in KINDS}
    order = random.Random(0)
    for number in range(rounds + 1):
        rng = np.random.default_rng(number)
        plan = traffic.plan(poisson_arrivals(rate, seconds, rng), rng)
        for kind in order.sample(list(times), len(times)):
            kept = times[kind] if number else Times()  # The first round only warms up.
            await experiment.run_block(KINDS[kind], plan, kept)
    return times


def p99(seconds: Sequence[float]) -> float:
    """In milliseconds."""
    return float(percentiles(np.array(seconds))[PERCENTILES.index(99)]) * 1e3


def figures_of(times: dict[str, Times], setting: str) -> list[Figure]:
    return [
        *(_loads(times, kind, setting) for kind in (LOADS, BESIDE_LOADS, DISK, FIRST, BESIDE_FIRST)),
        _neighbours(times, BESIDE_LOADS, QUIET, setting),
        _neighbours(times, BESIDE_FIRST, BESIDE_MORE, setting),
    ]


def _loads(times: dict[str, Times], kind: str, setting: str) -> Figure:
    loads = times[kind].loads
    first = KINDS[kind].act is first_request
    acted = "first requests, forward pass included" if first else "cold loads"
    what = f"p99 of {len(loads)} {acted}, {kind}, {setting}"
    measured = {"p50, ms": float(np.median(loads)) * 1e3, "p99, ms": p99(loads), "most, ms": max(loads) * 1e3}
    bound = None if kind == DISK else LOAD_BOUND
    return Figure("P9", what, p99(loads), bound, at_least=False, unit="ms", measured=measured)


def _neighbours(times: dict[str, Times], kind: str, calmer: str, setting: str) -> Figure:
    seconds = {name: times[name].neighbours for name in (kind, calmer)}
    measured = {f"p99, {name}, ms": p99(some) for name, some in seconds.items()}
    measured |= {f"p50, {name}, ms": float(np.median(some)) * 1e3 for name, some in seconds.items()}
    what = f"p99 of {len(seconds[kind])} {kind} / {calmer}, {setting}"
    ratio = p99(seconds[kind]) / p99(seconds[calmer])
    return Figure("P9", what, ratio, NEIGHBOUR_BOUND, at_least=False, unit="x", measured=measured)


def measure(dtype: str, arguments: argparse.Namespace) -> list[Figure]:
    """The figures of a server in one precision."""
    due = np.arange(0, arguments.block_seconds, 1 / arguments.loads).tolist()
    with tempfile.TemporaryDirectory(dir=RUNS) as scratch:
        root = Path(scratch)
        write_adapters(root, len(due))
        disk = Storage(root / "disk", max_bytes=2**40)
        disk.open()
        options = ["--adapter-root", str(root), "--max-resident-adapters", str(ROOM)]
        options += ["--storage", str(root / "storage"), "--precision", PRECISIONS[dtype]]
        with own_server(DEMO_ENCODER, root / "resident", root / "server.log", *options) as url:
            experiment = Experiment(url, root, due, disk)
            blocks = measure_blocks(experiment, arguments.rate, arguments.block_seconds, arguments.rounds)
            times = asyncio.run(blocks)
        disk.close()
    return figures_of(times, f"{arguments.loads:g} loads/s, {arguments.rate:g} requests/s, {dtype}")


def main() -> None:
    parser = command_line(__doc__, rounds=10)
    parser.add_argument("--block-seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=20, help="classifications a second")
    parser.add_argument("--loads", type=float, default=20, help="loads a second")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    behave_as_the_server()
    RUNS.mkdir(exist_ok=True)
    figures = [figure for dtype in arguments.dtypes for figure in measure(dtype, arguments)]
    save(figures, "bench_adapter_load", arguments.output)


if __name__ == "__main__":
    main()
