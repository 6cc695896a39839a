"""Other servers to compare with: where they are installed, how they are started and stopped.

port = free_port()
command = [str(peer_python("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), …]
with running(command, f"http://127.0.0.1:{port}", "/health", 300, Path("vllm.log")) as url:
    …

Or, without HTTP, how a program is run that answers lines.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from scripts.install_peers import PEERS, is_installed

STOP_SECONDS = 40
"""Longer than the grace period of any of the servers."""
POLL_SECONDS = 0.2
LOG_LINES = 30
OURS_ALONE = "GOMP_SPINCOUNT"
"""Importing `server` sets it for this process. Programs start without it, and our server sets it anew."""


class PeerError(Exception):
    """A peer is not installed, or does not start; the message says which and why."""


def peer_python(name: str) -> Path:
    """The interpreter of the environment that `make peers` made for a peer. Raises PeerError."""
    if not is_installed(name):
        raise PeerError(f"{name} is not installed in {PEERS / name}: run `make peers`")
    return PEERS / name / "bin" / "python"


def peer_version(name: str, package: str) -> str:
    """Which version of a package a peer is installed with. Raises PeerError."""
    program = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    command = [str(peer_python(name)), "-c", program, package]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    ready_path: str,
    timeout_s: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Run a server until the block ends; yields `url` once `url` + `ready_path` answers with status 200.

    `timeout_s`: how many seconds it has for that. What it prints goes to the file `log`. `environment` is
    added to the variables of this process, without `OURS_ALONE`. All processes that the server starts are
    stopped with it, also at SIGTERM to this process, so call it on the main thread. Raises PeerError with the
    end of the log where it ends by itself or does not become ready.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_inherited(), **(environment or {})},
            start_new_session=True,
        )
    with _exit_on_sigterm():
        try:
            _wait_until_ready(process, url + ready_path, timeout_s, log)
            yield url
        finally:
            _stop(process)


@contextmanager
def answering(command: Sequence[str], log: Path) -> Iterator[Callable[[str], str]]:
    """Run a program until the block ends, and wait for its first line, which says that it is ready.

    Yields what sends it a line and returns its answer, a line too. It runs where this project is; what it
    prints as errors goes to the file `log`. Raises PeerError with the end of that where it ends too early.
    """
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_inherited(),
            cwd=PEERS.parent,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def answer() -> str:
            if not (line := answers.readline()):
                raise PeerError(f"{command[0]} ended:\n{tail(log)}")
            return line

        def ask(line: str) -> str:
            asked.write(line + "\n")
            asked.flush()
            return answer()

        answer()
        yield ask
        # Leaving the block closes its input, and it ends.


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != OURS_ALONE}


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process by an exception: by itself it would leave the servers behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False) as http:
        while time.monotonic() < deadline:
            if (status := process.poll()) is not None:
                raise PeerError(f"the server ended with status {status}:\n{tail(log)}")
            if _is_ready(http, url):
                return
            time.sleep(POLL_SECONDS)
    raise PeerError(f"{url} was not ready after {timeout_s:g} s:\n{tail(log)}")


def _is_ready(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server and to what it started; SIGKILL to what is left of that in the end."""
    _signal_group(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """The server leads a session of its own, so its group is named after it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
