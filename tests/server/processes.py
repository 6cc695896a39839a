"""Servers in processes of their own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from server.cli import app
from tests.forks import FORKS


def molex(arguments: list[str]) -> None:
    app(arguments)


class Child:
    """A process that serves, or has served."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self._process = process
        self._log = log

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def terminate(self) -> None:
        """Tell it to end in order."""
        self._process.terminate()

    def ended(self) -> tuple[int | None, str]:
        """Wait for its end; its exit code and what it wrote to its log."""
        self._process.join(60)
        return self._process.exitcode, self._log.read_text(encoding="utf-8")


def _serve(
    program: Callable[[list[str]], Any],
    environment: dict[str, str],
    options: tuple[str, ...],
    output: Connection,
    log: Path,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    program(["serve", "--port", "0", *options])


@contextmanager
def started(
    environment: Mapping[str, str],
    *options: str,
    program: Callable[[list[str]], Any] = molex,
    processes: ForkServerContext | SpawnContext = FORKS,
) -> Iterator[tuple[Child, list[str]]]:
    """A server that is up, and the URLs of its listeners. It is killed in the end, if it still runs.

    What modules read of the environment when they are imported is that of the tests.
    """
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        output, childs_end = processes.Pipe(duplex=False)
        arguments = (program, dict(environment), options, childs_end, log)
        process = processes.Process(target=_serve, args=arguments)
        process.start()
        childs_end.close()
        child = Child(process, log)
        try:
            yield child, _urls(output, child)
        finally:
            child.kill()
            output.close()


def _urls(output: Connection, child: Child) -> list[str]:
    """Read the greeting of a server that is now up."""
    greeting = ""
    with open(output.fileno(), encoding="utf-8", closefd=False) as lines:
        while "/metrics" not in greeting:
            line = lines.readline()
            assert line, child.ended()
            greeting += line
    return re.findall(r"http://127.0.0.1:\d+", greeting)


def stopped(child: Child) -> str:
    """End a server in order; what it wrote to its log."""
    child.terminate()
    code, log = child.ended()
    assert code == 0, log
    return log
