"""Embeddings over HTTP: `molex serve` on the bare demo encoder against infinity on the same weights.

    python -m benchmarks.bench_embeddings [--rounds 5] [--seconds 10]

Five servers run side by side, each in a process of its own: ours in float32 and in bfloat16, infinity's torch
engine in both, and its ONNX engine, which has float32 only, on a graph optimized as infinity does it. Where
the CPU has no products of bfloat16 the two in it are left out. First all of them have to return the same
vectors. Then a closed loop of callers puts load on one server at a time, in rounds of a new order each; the
first round only warms up. The texts are sentences of SST-2 from ../shared/data where that is there, else
those of loadtests/demo_texts.txt.

The figures are requests a second of ours over infinity's better engine: in float32, and of our bfloat16 over
whichever of infinity's is best in either precision. `make peers` installs infinity.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.common import DEMO_ENCODER, FAST_DTYPES, PROJECT, command_line
from benchmarks.figures import Figure, save
from benchmarks.peers import free_port, peer_python, running
from benchmarks.served import BASE, PRECISIONS, TEXTS, own_server, requests_per_second
from loadtests.dialects import Results, is_embedding
from loadtests.schedule import Planned
from loadtests.texts import read_texts

ADAPTERS = PROJECT / "examples" / "adapters"
SENTENCES = PROJECT.parent / "shared" / "data" / "sst2" / "dev.tsv"
READY_SECONDS = 180
TIMEOUT_SECONDS = 60.0
MAX_REQUESTS = 20_000
"""In one block."""
LOWEST_COSINE = 0.999
COMPARED_TEXTS = 32
BOUND = 1

# What infinity does itself on starting, with the option names of an older version of its library.
EXPORT = """
import sys
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTOptimizer
from optimum.onnxruntime.configuration import OptimizationConfig

source, output = sys.argv[1:]
model = ORTModelForFeatureExtraction.from_pretrained(source, export=True, provider="CPUExecutionProvider")
config = OptimizationConfig(optimization_level=99)
ORTOptimizer.from_pretrained(model).optimize(optimization_config=config, save_dir=output)
"""
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
PACKAGES = ("infinity-emb", "optimum-onnx", "onnxruntime")


@dataclass(frozen=True)
class Arm:
    """A running server and where it takes texts."""

    name: str
    url: str
    path: str


@dataclass(frozen=True)
class Load:
    """`num_clients` callers with one request each at a time, which carries `num_texts` texts."""

    num_clients: int
    num_texts: int

    def plan(self, texts: Sequence[str]) -> list[Planned]:
        """More requests than a block has time for, the same for all servers."""
        rng = random.Random(0)
        drawn = ("\n".join(rng.choices(texts, k=self.num_texts)) for _ in range(MAX_REQUESTS))
        return [Planned(0.0, BASE, lines) for lines in drawn]

    def __str__(self) -> str:
        return f"{self.num_clients} callers, {self.num_texts} texts a request"


LOADS = (Load(32, 1), Load(4, 32))


def python_of_infinity(program: str, *arguments: str) -> str:
    """What a program prints; it runs where infinity is installed."""
    command = [str(peer_python("infinity")), "-c", program, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def infinity_server(model: Path, engine: str, dtype: str, log: Path) -> Iterator[str]:
    """infinity on a model folder; yields its URL."""
    port = free_port()
    program = peer_python("infinity").with_name("infinity_emb")
    command = [str(program), "v2", "--model-id", str(model), "--served-model-name", BASE]
    command += ["--engine", engine, "--dtype", dtype, "--device", "cpu", "--pooling-method", "mean"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    # Its warm-up takes more positions than a RoBERTa model has, its cache would answer for the model, and
    # BetterTransformer is no longer in the library that it took it from.
    command += ["--no-model-warmup", "--no-vector-disk-cache", "--no-bettertransformer"]
    environment = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with running(command, f"http://127.0.0.1:{port}", "/health", READY_SECONDS, log, environment) as url:
        yield url


@contextmanager
def all_servers(scratch: Path) -> Iterator[list[Arm]]:
    """Everything that is compared."""
    graph = scratch / "onnx"
    python_of_infinity(EXPORT, str(DEMO_ENCODER), str(graph))
    engines = [("torch", DEMO_ENCODER, dtype) for dtype in FAST_DTYPES] + [("optimum", graph, "float32")]
    arms = []
    with ExitStack() as stack:
        for dtype in FAST_DTYPES:
            server = own_server(
                DEMO_ENCODER, ADAPTERS, scratch / f"own-{dtype}.log", "--precision", PRECISIONS[dtype]
            )
            arms.append(Arm(f"ours {dtype}", stack.enter_context(server), "/v1/embeddings"))
        for engine, model, dtype in engines:
            server = infinity_server(model, engine, dtype, scratch / f"{engine}-{dtype}.log")
            arms.append(Arm(f"infinity {engine} {dtype}", stack.enter_context(server), "/embeddings"))
        yield arms


def check_vectors(arms: Sequence[Arm], texts: Sequence[str]) -> None:
    """Raises ValueError where a server's vectors have another direction than those of the first."""
    reference = _unit_vectors(arms[0], texts)
    for arm in arms:
        lowest = (_unit_vectors(arm, texts) * reference).sum(axis=1).min()
        print(f"{arm.name}: lowest cosine with {arms[0].name} {lowest:.5f}")
        if not lowest > LOWEST_COSINE:
            raise ValueError(f"{arm.name} returns other vectors than {arms[0].name}: cosine {lowest:.5f}")


def _unit_vectors(arm: Arm, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """[texts, d]"""
    body = {"model": BASE, "input": texts}
    response = httpx.post(arm.url + arm.path, json=body, timeout=TIMEOUT_SECONDS, trust_env=False)
    entries = response.raise_for_status().json()["data"]
    vectors = np.array([entry["embedding"] for entry in entries], np.float64)
    lengths: npt.NDArray[np.float64] = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


def measure(
    arms: Sequence[Arm], load: Load, texts: Sequence[str], rounds: int, seconds: float
) -> dict[str, float]:
    """Median requests a second of each server, each put under load for `seconds` a round."""
    rates: dict[str, list[float]] = {arm.name: [] for arm in arms}
    plan, rng = load.plan(texts), random.Random(0)
    for number in range(rounds + 1):
        for arm in rng.sample(arms, len(arms)):
            dialect = Results(arm.path, is_embedding, load.num_texts)
            rate = asyncio.run(requests_per_second(arm.url, dialect, plan, load.num_clients, seconds))
            if number:
                rates[arm.name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def figures_of(load: Load, medians: dict[str, float]) -> list[Figure]:
    print(f"\n{load}")
    for name, rate in medians.items():
        print(f"  {name:<28}{rate:10.1f} requests/s")
    peers = [name for name in medians if name.startswith("infinity")]
    exact = [name for name in peers if name.endswith("float32")]
    compared = {"float32": exact, "bfloat16": peers}
    return [_figure(load, medians, dtype, compared[dtype]) for dtype in FAST_DTYPES]


def _figure(load: Load, medians: dict[str, float], dtype: str, peers: Sequence[str]) -> Figure:
    own, best = f"ours {dtype}", max(peers, key=medians.__getitem__)
    measured = {f"{name}, requests/s": medians[name] for name in (own, *peers)}
    what = f"embeddings, {own} / {best}, {load}"
    return Figure("P5", what, medians[own] / medians[best], BOUND, at_least=True, unit="x", measured=measured)


def main() -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a block under load")
    arguments = parser.parse_args()
    texts = read_texts(SENTENCES if SENTENCES.exists() else TEXTS)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as scratch, all_servers(Path(scratch)) as arms:
        check_vectors(arms, texts[:COMPARED_TEXTS])
        for load in LOADS:
            medians = measure(arms, load, texts, arguments.rounds, arguments.seconds)
            figures += figures_of(load, medians)
    versions = python_of_infinity(VERSIONS, *PACKAGES).split()
    save(figures, "bench_embeddings", arguments.output, dict(zip(PACKAGES, versions, strict=True)))


if __name__ == "__main__":
    main()
