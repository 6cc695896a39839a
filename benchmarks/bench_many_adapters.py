"""What many registered adapters cost: requests a second with 2,000 of them, 64 in memory, against 5.

    python -m benchmarks.bench_many_adapters [--rounds 20] [--seconds 3] [--many 2000] [--resident 64]

One `molex serve` of the demo encoder for each precision, with all adapters registered. 64 callers send single
sentences, each the next when it has its answer. The popularity of adapters falls by Zipf's law in every arm:
over the few, over as many as fit into memory, and over all, where a request that names an evicted adapter has
it read again. Blocks of the arms take turns in random order. Adapters are random rank-8 MoLEx adapters that
mix every depth, 1.2 MB each.

The client runs on the same CPUs as the server.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from benchmarks.common import DEMO_ENCODER, DTYPES, PROJECT, command_line
from benchmarks.figures import Figure, save
from benchmarks.served import (
    BASE,
    PRECISIONS,
    TEXTS,
    own_server,
    requests_per_second,
    write_random_adapters,
)
from loadtests.dialects import make_dialect
from loadtests.schedule import Planned, Traffic
from loadtests.texts import read_texts

BOUND = 0.97
RUNS = PROJECT / "runs"
MAX_REQUESTS = 20_000
"""More than a block has time for."""


@dataclass(frozen=True)
class Measured:
    """Of one precision: median requests a second by number of adapters, and cold loads a second with all."""

    rates: Mapping[int, float]
    cold_loads: float


async def cold_loads(url: str) -> float:
    """How many adapters were brought back into memory so far."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    counted = f'molex_cold_load_seconds_count{{base="{BASE}",result="loaded"}} '
    return next(float(line.removeprefix(counted)) for line in lines if line.startswith(counted))


def plan(adapters: Sequence[str], seed: int) -> list[Planned]:
    """Sentences and adapters drawn anew for each seed."""
    traffic = Traffic(read_texts(TEXTS), adapters, "zipf:1")
    return traffic.plan(np.zeros(MAX_REQUESTS), np.random.default_rng(seed))


async def measure(
    url: str, names: Sequence[str], sizes: Sequence[int], callers: int, seconds: float, rounds: int
) -> Measured:
    """Every round has a block for each number of adapters in `sizes`; the first round only warms up."""
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    loads: list[float] = []
    dialect, order = make_dialect("molex-classify", None), random.Random(0)
    for number in range(rounds + 1):
        for size in order.sample(list(sizes), len(sizes)):
            before = await cold_loads(url)
            rate = await requests_per_second(url, dialect, plan(names[:size], number), callers, seconds)
            if number:
                rates[size].append(rate)
                if size == max(sizes):
                    loads.append((await cold_loads(url) - before) / seconds)
    medians = {size: statistics.median(values) for size, values in rates.items()}
    return Measured(medians, statistics.median(loads))


def figures_of(measured: Mapping[str, Measured], few: int, resident: int, many: int) -> list[Figure]:
    """The precision in which the few are fastest is held to the bound."""
    best = max(measured, key=lambda dtype: measured[dtype].rates[few])
    figures = []
    for dtype, result in measured.items():
        rates = {f"{size} adapters, requests/s": rate for size, rate in result.rates.items()}
        for size, what in ((resident, "all in memory"), (many, f"{resident} of them in memory")):
            bound = BOUND if (dtype, size) == (best, many) else None
            extra = {"cold loads/s": result.cold_loads} if size == many else {}
            figures.append(
                Figure(
                    "P8",
                    f"requests/s with {size} adapters, {what} / {few}, {dtype}",
                    result.rates[size] / result.rates[few],
                    bound,
                    at_least=True,
                    unit="x",
                    measured=rates | extra,
                )
            )
    return figures


def main() -> None:
    parser = command_line(__doc__, rounds=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a block")
    parser.add_argument("--many", type=int, default=2000)
    parser.add_argument("--resident", type=int, default=64)
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    few, resident, many = arguments.few, arguments.resident, arguments.many
    names = [f"adapter-{number}" for number in range(many)]
    measured = {}
    RUNS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS) as scratch:
        root = Path(scratch) / "adapters"
        write_random_adapters([root / name for name in names])
        options = ["--max-resident-adapters", str(resident)]
        for dtype in arguments.dtypes:
            server = [*options, "--precision", PRECISIONS[dtype]]
            with own_server(DEMO_ENCODER, root, Path(scratch) / f"{dtype}.log", *server) as url:
                blocks = measure(
                    url,
                    names,
                    (few, resident, many),
                    arguments.callers,
                    arguments.seconds,
                    arguments.rounds,
                )
                measured[dtype] = asyncio.run(blocks)
    save(figures_of(measured, few, resident, many), "bench_many_adapters", arguments.output)


if __name__ == "__main__":
    main()
