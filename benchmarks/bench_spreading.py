"""What a CPU for each thread of a pass gains a single request.

    python -m benchmarks.bench_spreading [--rounds 100] [--neighbours 0 2] [--pauses 0 50] [--output DIR]

One sentence after another, with so many milliseconds before it, goes to two servers of the demo encoder in
turn: to `molex serve` as it is, and with OMP_PROC_BIND=false, which leaves its threads to the system
(`molex/native/threads.py`). Alone, and beside so many processes that compute without end.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bench_http_overhead import ADAPTERS, TEXTS, Arm, http_arm
from benchmarks.bench_waiting import busy_neighbours
from benchmarks.common import DEMO_ENCODER, command_line, milliseconds
from benchmarks.figures import Figure, save
from benchmarks.served import own_server
from loadtests.texts import read_texts

KINDS = {"LoRA": "sst2-lora", "MoLEx": "sst2-molex"}
SERVERS = {"spread": {}, "as the system likes": {"OMP_PROC_BIND": "false"}}
PRECISION = ("--precision", "fp32")


def medians_of(arms: Mapping[str, Arm], texts: Sequence[str], rounds: int, pause: float) -> dict[str, float]:
    """Median seconds of each arm; every round has one request of each, in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    rng = random.Random(0)
    for number in range(rounds):
        for name in rng.sample(list(arms), len(arms)):
            time.sleep(pause)
            seconds[name].append(arms[name](texts[number % len(texts)]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(arms: Mapping[str, Arm], neighbours: int, pause_ms: int, rounds: int) -> list[Figure]:
    with busy_neighbours(neighbours):
        medians = medians_of(arms, read_texts(TEXTS), rounds, pause_ms / 1e3)
    figures = []
    for kind in KINDS:
        pair = [f"{kind}, {server}" for server in SERVERS]
        what = f"a request with threads as the system likes / spread, {kind}, {pause_ms} ms before it"
        what += f", {neighbours} busy neighbours"
        ratio = medians[pair[1]] / medians[pair[0]]
        figures.append(Figure("spread", what, ratio, None, True, "x", milliseconds(medians, pair)))
    return figures


def main() -> None:
    parser = command_line(__doc__, rounds=100)
    parser.add_argument("--neighbours", nargs="+", type=int, default=(0, 2))
    parser.add_argument("--pauses", nargs="+", type=int, default=(0, 50))
    options = parser.parse_args()
    arms: dict[str, Arm] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, environment in SERVERS.items():
            log = folder / f"{name}.log"
            server = own_server(DEMO_ENCODER, ADAPTERS, log, *PRECISION, environment=environment)
            url = stack.enter_context(server)
            for kind, adapter in KINDS.items():
                arms[f"{kind}, {name}"] = http_arm(url, adapter)
        figures = [
            figure
            for neighbours in options.neighbours
            for pause in options.pauses
            for figure in compare(arms, neighbours, pause, options.rounds)
        ]
    save(figures, "bench_spreading", options.output)


if __name__ == "__main__":
    main()
