"""Whether requests should join a pass that is under way instead of waiting for its end.

    python -m benchmarks.bench_joining [--rounds 10] [--seconds 4] [--dtypes …] [--passes 2 12]

The engine runs what waits as one pass through all depths, and what arrives meanwhile waits for its end. Here
it is held against depth-wise joining: what has arrived begins a pass of its own at the next boundary between
two depths, up to so many passes advance together, one depth each, and rows at different depths that want the
same layer share its call (`benchmarks/joining.py`).

Sentences for the example adapters of the demo encoder, two with MoLEx and one with LoRA, arrive as a Poisson
process at shares of what plain batches can do at most, which is measured anew in every round: the machine may
be busier than in the last. At each share all arms get the same arrivals, one after another in random order.
Times count from when a request was due; where nothing is to be done until the next, the clock is put forward.
With --cpu-time one thread computes, and the clock shows its own seconds, which others on the machine hardly
change. The figure is the 99th percentile with joining over that of plain batches.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common import DEMO_ENCODER, DTYPES, PROJECT, OwnEngine, behave_as_the_server, command_line
from benchmarks.figures import Figure, save
from benchmarks.joining import Cohort, Joined
from benchmarks.served import TEXTS
from loadtests.latency import PERCENTILES, FloatArray, percentiles
from loadtests.ratios import ratio_intervals
from loadtests.schedule import Planned, Traffic, poisson_arrivals
from loadtests.texts import read_texts
from molex import Row, read_adapter
from molex.tokenizer import load_tokenizer

ADAPTERS = ("sst2-molex", "trec-molex", "sst2-lora")
SHARES = (0.5, 0.8, 0.95)
MAX_BATCH_TOKENS = 2048
CAPACITY_REQUESTS = 200
PLAIN = 1
BOUND = 0.9
KEY = "Joining"

Blocks = dict[tuple[float, int], list[FloatArray]]
"""Latencies in seconds of each block, by share of the capacity and passes under way at most."""


@dataclass(frozen=True)
class Arrival:
    """A request that is due so many seconds after its block has begun."""

    due: float
    row: Row


class Worker:
    """Serves one block after another on this thread, as the server's worker would, by a clock in seconds."""

    def __init__(self, dtype: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._model = OwnEngine(DEMO_ENCODER, dtype).model
        spec, device = self._model.spec, self._model.device
        folders = {name: PROJECT / "examples" / "adapters" / name for name in ADAPTERS}
        self._adapters = {n: read_adapter(f, spec, self._model.dtype, device) for n, f in folders.items()}
        self._joined = Joined(self._model, list(self._adapters.values()))
        self._tokenizer = load_tokenizer(DEMO_ENCODER, spec)

    def arrivals(self, plan: Sequence[Planned]) -> list[Arrival]:
        rows = [Row(self._tokenizer(p.text)["input_ids"], self._adapters[p.model]) for p in plan]
        return [Arrival(planned.due, row) for planned, row in zip(plan, rows, strict=True)]

    @torch.inference_mode()
    def serve(self, arrivals: Sequence[Arrival], passes: int) -> FloatArray:
        """Latencies of all arrivals, in seconds, with so many passes under way at most."""
        latencies: list[float] = []
        to_come = deque(arrivals)
        under_way: dict[Cohort, list[Arrival]] = {}
        start = self._clock()
        while to_come or under_way:
            if not under_way:
                start = min(start, self._clock() - to_come[0].due)  # Nothing to wait for.
            if len(under_way) < passes:
                room = MAX_BATCH_TOKENS - sum(cohort.packed.num_tokens for cohort in under_way)
                if taken := list(_due(to_come, self._clock() - start, room)):
                    under_way[Cohort(self._model, [arrival.row for arrival in taken])] = taken
            self._joined.advance(list(under_way))
            for cohort in [cohort for cohort in under_way if cohort.ended]:
                cohort.logits()
                now = self._clock() - start
                latencies += [now - arrival.due for arrival in under_way.pop(cohort)]
        return np.array(latencies)

    def capacity(self, arrivals: Sequence[Arrival]) -> float:
        """Requests a second of plain batches where all of them wait."""
        return len(arrivals) / float(self.serve(arrivals, PLAIN).max())


def _due(to_come: deque[Arrival], now: float, tokens: int) -> Iterator[Arrival]:
    """Remove and yield those that have come, oldest first, up to so many tokens."""
    while to_come and to_come[0].due <= now and len(to_come[0].row.token_ids) <= tokens:
        tokens -= len(to_come[0].row.token_ids)
        yield to_come.popleft()


def run_blocks(worker: Worker, passes: Sequence[int], rounds: int, seconds: float) -> Blocks:
    traffic = Traffic(read_texts(TEXTS), ADAPTERS, "uniform")
    blocks: Blocks = defaultdict(list)
    order = random.Random(0)
    for round_ in range(rounds + 1):
        rng = np.random.default_rng(round_)
        waiting = worker.arrivals(traffic.plan(np.zeros(CAPACITY_REQUESTS), rng))
        capacity = worker.capacity(waiting)
        for share in order.sample(SHARES, len(SHARES)):
            due = poisson_arrivals(share * capacity, seconds, rng)
            arrivals = worker.arrivals(traffic.plan(due, rng))
            for most in order.sample(passes, len(passes)):
                latencies = worker.serve(arrivals, most)
                if round_:  # The first one only warms up.
                    blocks[share, most].append(latencies)
        print(f"round {round_}: {capacity:.0f} requests/s at most", flush=True)
    return blocks


def figures_of(blocks: Blocks, dtype: str) -> Iterator[Figure]:
    for (share, most), joined in sorted(blocks.items()):
        if most == PLAIN:
            continue
        plain = blocks[share, PLAIN]
        intervals = ratio_intervals(joined, plain, np.random.default_rng(0))
        own, over = (percentiles(np.concatenate(arm)) * 1e3 for arm in (plain, joined))
        print(f"{share:.0%} of capacity, {most} passes, {sum(map(len, plain))} requests, {dtype}")
        for number, percentile in enumerate(PERCENTILES):
            ratio, low, high = intervals[:, number]
            times = f"{own[number]:.1f} ms, joined {over[number]:.1f} ms"
            print(f"  p{percentile}: {times}: {ratio:.2f} x [{low:.2f}, {high:.2f}]")
        what = f"p99 of up to {most} passes at a time / plain batches, {share:.0%} of capacity, {dtype}"
        measured = {"plain p99, ms": own[-1], "joined p99, ms": over[-1]}
        yield Figure(KEY, what, intervals[0][-1], BOUND, at_least=False, unit="x", measured=measured)


def main() -> None:
    parser = command_line(__doc__, rounds=10)
    parser.add_argument("--seconds", type=float, default=4, help="of a block")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; see above")
    parser.add_argument("--passes", nargs="+", type=int, default=[2, 12], help="under way at most")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    behave_as_the_server()
    figures: list[Figure] = []
    for dtype in arguments.dtypes:
        blocks = run_blocks(
            Worker(dtype, clock), [PLAIN, *arguments.passes], arguments.rounds, arguments.seconds
        )
        figures += figures_of(blocks, dtype)
    save(figures, "bench_joining", arguments.output)


if __name__ == "__main__":
    main()
