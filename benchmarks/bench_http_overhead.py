"""What HTTP adds to a single classification.

    python -m benchmarks.bench_http_overhead [--rounds 8] [--starts 3] [--dtypes float32 bfloat16]
                                             [--adapter sst2-molex]

The same texts, one request after another, go over a kept connection to `molex serve` in a process of its own,
and to a `server.engine.Engine` in this one, which takes them from a text to its label as a handler has it do.
Blocks of both alternate, so that they never run at once. The engine's worker alone has helper threads
(`molex/threads.py`): with more threads than cores those of a pass would sleep between its parts. Both are
started some times over, as what they take differs from process to process by tenths of a millisecond.

The time over HTTP starts before the request is written and ends when the answer is read, so that it has the
client's part in it. The texts are no longer than a sentence. The client is the standard library's, because a
heavier one would be measured too.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.common import DEMO_ENCODER, DTYPES, PROJECT, behave_as_the_server, command_line
from benchmarks.figures import Figure, save
from benchmarks.served import BASE, PRECISIONS, own_server
from loadtests.texts import read_texts
from server.engine import Engine
from server.sequence import Sequence as TokenSequence
from server.settings import Settings

ADAPTERS = PROJECT / "examples" / "adapters"
TEXTS = PROJECT / "loadtests" / "demo_texts.txt"
WARM_UP = 5
"""Uncounted requests at the start of each block, after which caches and helper threads are the arm's own."""
BOUND = 2
TIMEOUT_SECONDS = 60

Arm = Callable[[str], float]
"""Classifies one text; returns the seconds it took."""


def http_arm(url: str, adapter: str) -> Arm:
    connection = HTTPConnection(urlsplit(url).netloc)
    headers = {"content-type": "application/json"}

    def classify(text: str) -> float:
        body = json.dumps({"model": adapter, "input": text}).encode()
        start = time.perf_counter()
        connection.request("POST", "/v1/classify", body, headers)
        response = connection.getresponse()
        answer = response.read()
        seconds = time.perf_counter() - start
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {answer.decode()}")
        return seconds

    return classify


@contextmanager
def running_engine(dtype: str) -> Iterator[tuple[Engine, asyncio.Runner]]:
    """An engine with the example adapters, and what runs coroutines on its event loop."""
    settings = {"bases": {BASE: str(DEMO_ENCODER)}, "precision": PRECISIONS[dtype]}
    engine = Engine.load(Settings.model_validate(settings))
    engine.adapters.load_folder(ADAPTERS)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        yield engine, runner
        runner.run(engine.stop())


def engine_arm(engine: Engine, runner: asyncio.Runner, adapter: str) -> Arm:
    served, tokenization = engine.adapters.get(adapter), engine.bases[BASE].tokenization

    async def classify(text: str) -> float:
        start = time.perf_counter()
        weights = await engine.loader.begin(served)
        [prompt] = tokenization.encode([text], "input")
        deadline = asyncio.get_running_loop().time() + TIMEOUT_SECONDS
        submission = engine.submit([TokenSequence(BASE, weights, prompt.token_ids)], deadline)
        await submission.finished()
        seconds = time.perf_counter() - start
        submission.cancel()
        return seconds

    return lambda text: runner.run(classify(text))


def alternate(arms: dict[str, Arm], texts: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each request of each arm; every round has a block of each, in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(arms), len(arms)):
            for text in texts[:WARM_UP]:
                arms[name](text)
            seconds[name] += [arms[name](text) for text in texts]
    return seconds


def one_start(dtype: str, name: str, texts: Sequence[str], rounds: int) -> dict[str, list[float]]:
    with (
        tempfile.TemporaryDirectory() as scratch,
        own_server(
            DEMO_ENCODER, ADAPTERS, Path(scratch) / "server.log", "--precision", PRECISIONS[dtype]
        ) as url,
        running_engine(dtype) as (engine, runner),
    ):
        arms = {"HTTP": http_arm(url, name), "engine": engine_arm(engine, runner, name)}
        return alternate(arms, texts, rounds)


def compare(dtype: str, name: str, texts: Sequence[str], rounds: int, starts: int) -> Figure:
    runs = [one_start(dtype, name, texts, rounds) for _ in range(starts)]
    medians = {arm: statistics.median(s for run in runs for s in run[arm]) for arm in runs[0]}
    measured = {f"{arm}, ms": seconds * 1e3 for arm, seconds in medians.items()}
    added = (medians["HTTP"] - medians["engine"]) * 1e3
    what = f"median over HTTP − median of the engine, {name} on the demo encoder, {dtype}"
    return Figure("P11", what, added, BOUND, at_least=False, unit="ms", measured=measured)


def main() -> None:
    parser = command_line(__doc__, rounds=8)
    parser.add_argument("--starts", type=int, default=3, help="of both")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--adapter", default="sst2-molex", help="one of examples/adapters")
    arguments = parser.parse_args()
    behave_as_the_server()
    texts = read_texts(TEXTS)
    figures = [
        compare(dtype, arguments.adapter, texts, arguments.rounds, arguments.starts)
        for dtype in arguments.dtypes
    ]
    save(figures, "bench_http_overhead", arguments.output)


if __name__ == "__main__":
    main()
