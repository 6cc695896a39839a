"""Servers in processes of their own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

COMMAND = [sys.executable, "-c", "from server.cli import app; app()", "serve", "--port", "0"]
Child = subprocess.Popen[str]


@contextmanager
def started(environment: Mapping[str, str], *options: str) -> Iterator[tuple[Child, list[str]]]:
    """A server that is up, and the URLs of its listeners. It is killed in the end, if it still runs."""
    child = subprocess.Popen(
        [*COMMAND, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        greeting = ""
        while "/metrics" not in greeting:
            line = child.stdout.readline()
            assert line, child.communicate()
            greeting += line
        yield child, re.findall(r"http://127.0.0.1:\d+", greeting)
    finally:
        if child.returncode is None:
            child.kill()
            child.communicate()


def stopped(child: Child) -> str:
    """End a server in order; what it wrote to its log."""
    child.send_signal(signal.SIGTERM)
    return child.communicate(timeout=60)[1]
