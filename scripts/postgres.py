"""A private PostgreSQL for tests: a cluster in a temporary folder, on a free loopback port.

    python -m scripts.postgres

prints its URL and serves until it is interrupted. Nothing of a PostgreSQL that runs already is touched.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")
ACCOUNTS = ("postgres", "nobody")
"""PostgreSQL refuses to run as root: root runs it as the first of these that exists."""
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
"""A test's cluster does not have to survive a crash of the machine."""


def find_binaries() -> Path | None:
    """The folder of PostgreSQL's server programs, of the newest version; None where there is none."""
    installed = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if installed:
        return installed[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found and shutil.which("postgres") else None


@contextmanager
def private_cluster(binaries: Path) -> Iterator[str]:
    """Run a cluster; gives the URL of its empty database `postgres`. Raises CalledProcessError."""
    account = _account()
    with tempfile.TemporaryDirectory(prefix="molex-postgres-") as folder:
        if account:
            shutil.chown(folder, account)
        data, port = f"{folder}/data", _free_port()
        # Only programs of this user on this machine reach the cluster, and it is gone after the tests.
        initdb = [f"{binaries}/initdb", "-D", data, "-U", "molex", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, user=account, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        settings = ["listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={folder}", *FAST]
        options = " ".join(f"-c {setting}" for setting in settings)
        control = [f"{binaries}/pg_ctl", "-D", data, "-w"]
        start = [*control, "-l", f"{folder}/log", "-o", options, "start"]
        subprocess.run(start, user=account, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        try:
            yield f"postgresql://molex@127.0.0.1:{port}/postgres"
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(stop, user=account, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _account() -> str | None:
    """Who runs the cluster; None for whoever runs this."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ACCOUNTS if name in known)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("no PostgreSQL server is installed")
    with private_cluster(binaries) as url, suppress(KeyboardInterrupt):
        print(url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
