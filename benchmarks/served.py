"""Our own server in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import free_port, running

READY_SECONDS = 120
BASE = "base"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
"""How `--precision` spells them."""


@contextmanager
def own_server(base: Path, adapters: Path, log: Path, *options: str) -> Iterator[str]:
    """`molex serve` with one base, called "base", and a folder of adapters; yields its URL once it is ready.

    `options` go to the command as they are; what it prints goes to the file `log`. Raises
    `benchmarks.peers.PeerError` where it does not start.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("molex")), "serve", "--port", str(port)]
    command += ["--base", f"{BASE}={base}", "--adapters", str(adapters), "--log-level", "warning", *options]
    with running(command, f"http://127.0.0.1:{port}", "/readyz", READY_SECONDS, log) as url:
        yield url
