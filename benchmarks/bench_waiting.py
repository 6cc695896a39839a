"""What short waits of the threads of a pass cost and gain: generation with them and with OpenMP's own.

    python -m benchmarks.bench_waiting [--rounds 7] [--neighbours 0 2 4] [--output DIR]

16 streams over 8 LoRA adapters on the demo decoder, over HTTP, from a server as it is and from one that waits
as GNU's OpenMP does by default (`GOMP_SPINCOUNT`, see `server/__init__.py`). Both run beside so many
processes that compute without end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.bench_generation import ADAPTER_FOLDER, ADAPTERS, MODEL, STREAMS
from benchmarks.common import (
    Contestant,
    behave_as_the_server,
    command_line,
    measure,
    milliseconds,
    sentences,
)
from benchmarks.figures import Figure, save
from benchmarks.generation_arms import Workload, over_http, write_adapters
from benchmarks.served import own_server
from server import SPIN_COUNT

TOKENS = 16
WAITS = {"short": SPIN_COUNT, "as OpenMP does": 300_000}
"""How often a thread looks for the others before it sleeps; the larger is what OpenMP takes by default."""


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Processes that compute until the block ends."""
    command = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def beside(count: int, contestant: Contestant) -> Contestant:
    def run() -> None:
        with busy_neighbours(count):
            contestant()

    return run


def name(waits: str, neighbours: int) -> str:
    return f"{waits}, {neighbours} neighbours"


def main() -> None:
    parser = command_line(__doc__, rounds=7)
    parser.add_argument("--neighbours", nargs="+", type=int, default=(0, 2, 4))
    options = parser.parse_args()
    behave_as_the_server()
    contestants: dict[str, Contestant] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        adapters = folder / ADAPTER_FOLDER
        write_adapters(MODEL, adapters, ADAPTERS)
        load = Workload(sentences(STREAMS, seed=1), [n % ADAPTERS for n in range(STREAMS)], TOKENS)
        for waits, count in WAITS.items():
            environment = {"GOMP_SPINCOUNT": str(count)}
            log = folder / f"{count}.log"
            server = own_server(MODEL, adapters, log, "--precision", "bf16", environment=environment)
            generate = over_http(stack.enter_context(server), load, "lora")
            contestants |= {name(waits, n): beside(n, generate) for n in options.neighbours}
        medians = measure(contestants, options.rounds)
    figures = []
    for count in options.neighbours:
        pair = [name(waits, count) for waits in WAITS]
        what = f"time with waits as OpenMP's / with short ones, {STREAMS} streams, {count} busy neighbours"
        ratio = medians[pair[1]] / medians[pair[0]]
        figures.append(Figure("waits", what, ratio, None, True, "x", milliseconds(medians, pair)))
    save(figures, "bench_waiting", options.output)


if __name__ == "__main__":
    main()
