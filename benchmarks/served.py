"""Our own server in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import DEMO_ENCODER, PROJECT, mixing_everywhere, random_adapter
from benchmarks.peers import free_port, running
from loadtests.client import Client, Outcome, connection_pool
from loadtests.dialects import Dialect
from loadtests.loops import closed_loop
from loadtests.schedule import Planned
from molex import MolexModel, write_adapter

READY_SECONDS = 120
TIMEOUT_SECONDS = 60
BASE = "base"
TEXTS = PROJECT / "loadtests" / "demo_texts.txt"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
"""How `--precision` spells them."""


@contextmanager
def own_server(
    base: Path, adapters: Path, log: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """`molex serve` with one base, called "base", and a folder of adapters; yields its URL once it is ready.

    `options` go to the command as they are, `environment` to its variables; what it prints goes to the file
    `log`. Raises `benchmarks.peers.PeerError` where it does not start.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("molex")), "serve", "--port", str(port)]
    command += ["--base", f"{BASE}={base}", "--adapters", str(adapters), "--log-level", "warning", *options]
    with running(command, f"http://127.0.0.1:{port}", "/readyz", READY_SECONDS, log, environment) as url:
        yield url


def write_random_adapters(folders: Sequence[Path]) -> None:
    """A random MoLEx adapter for the demo encoder, which mixes every depth, in each folder; on the disk."""
    spec = MolexModel.from_pretrained(DEMO_ENCODER).spec
    for seed, folder in enumerate(folders):
        write_adapter(random_adapter(spec, seed, mixing_everywhere(spec)), folder)
        for path in folder.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # Pages that are not on the disk yet cannot be dropped.


async def requests_per_second(
    url: str, dialect: Dialect, plan: Sequence[Planned], num_clients: int, seconds: float
) -> float:
    """What a server answers to callers that send one request after another, for `seconds`.

    Raises ValueError where a request fails: a server must not look fast because it refuses.
    """
    async with connection_pool(url) as http:
        results = await closed_loop(Client(http, dialect, TIMEOUT_SECONDS), plan, num_clients, seconds)
    for result in results:
        if result.outcome is not Outcome.OK:
            raise ValueError(f"{result.model} at {url}: {result.outcome}, status {result.status}")
    return len(results) / max(result.end for result in results)
