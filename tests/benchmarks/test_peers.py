"""Starting and stopping other servers, with the web server of Python's library in their place."""

from __future__ import annotations

import signal
import subprocess
import sys

import httpx
import pytest

from benchmarks import peers
from benchmarks.peers import PeerError, answering, free_port, peer_python, running
from scripts import install_peers


@pytest.fixture
def site(tmp_path):
    """A folder with one page."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "health").write_text("fine")
    return folder


@pytest.fixture
def server(site):
    """Command and URL of a web server."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "--directory",
        str(site),
    ]
    return command, f"http://127.0.0.1:{port}"


def assert_stopped(url):
    """Nobody listens any more. What a server started may be on its way out; each look is a request."""
    for _ in range(100):
        try:
            httpx.get(f"{url}/health", trust_env=False)
        except httpx.ConnectError:
            return
        except httpx.TransportError:
            pass
    raise AssertionError("somebody still listens")


def test_a_server_answers_inside_the_block_and_is_gone_after_it(server, tmp_path):
    command, url = server
    with running(command, url, "/health", 60, tmp_path / "log") as address:
        assert httpx.get(f"{address}/health", trust_env=False).text == "fine"
    assert_stopped(url)
    assert "GET /health" in (tmp_path / "log").read_text()


def test_it_is_gone_when_the_benchmark_is_told_to_end(server, tmp_path):
    command, url = server
    program = (
        "import signal; from pathlib import Path; from benchmarks.peers import running\n"
        f"with running({command!r}, {url!r}, '/health', 60, Path({str(tmp_path / 'log')!r})):\n"
        "    print('ready', flush=True)\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout.readline() == "ready\n"
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(60) == 128 + signal.SIGTERM
    assert_stopped(url)


def test_it_is_gone_after_an_exception_too(server, tmp_path):
    command, url = server
    with pytest.raises(KeyError), running(command, url, "/health", 60, tmp_path / "log"):
        raise KeyError
    assert_stopped(url)


def test_processes_that_a_server_started_stop_with_it(server, tmp_path):
    command, url = server
    shell = ["sh", "-c", '"$@" & wait', "sh", *command]
    with running(shell, url, "/health", 60, tmp_path / "log"):
        pass
    assert_stopped(url)


def test_a_server_that_does_not_heed_a_signal_is_killed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "STOP_SECONDS", 0.1)
    command, url = server
    with running(
        ["sh", "-c", 'trap "" TERM; exec "$@"', "sh", *command], url, "/health", 60, tmp_path / "log"
    ):
        pass
    assert_stopped(url)


def test_a_server_gets_the_variables_it_is_given(tmp_path):
    log = tmp_path / "log"
    with (
        pytest.raises(PeerError, match="status 3:\nsix"),
        running(["sh", "-c", "echo $NUMBER; exit 3"], "http://127.0.0.1:1", "/", 60, log, {"NUMBER": "six"}),
    ):
        pass


def test_a_server_that_does_not_become_ready(server, tmp_path):
    command, url = server
    with (
        pytest.raises(PeerError, match=r"/missing was not ready after 0\.5 s"),
        running(command, url, "/missing", 0.5, tmp_path / "log"),
    ):
        pass
    assert_stopped(url)


def test_a_program_answers_line_by_line(tmp_path):
    program = "print('ready', flush=True)\nfor line in iter(input, 'end'): print(line.upper(), flush=True)"
    with answering([sys.executable, "-c", program], tmp_path / "log") as ask:
        assert ask("one") == "ONE\n"
        assert ask("two") == "TWO\n"
        with pytest.raises(PeerError, match="ended"):
            ask("end")


def test_a_program_does_not_inherit_how_long_our_threads_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "4000")
    program = "import os\nprint('ready', flush=True)\ninput()\nprint(os.getenv('GOMP_SPINCOUNT'), flush=True)"
    with answering([sys.executable, "-c", program], tmp_path / "log") as ask:
        assert ask("?") == "None\n"


def test_a_program_that_ends_before_it_is_ready(tmp_path):
    program = "raise SystemExit('there is no model')"
    with (
        pytest.raises(PeerError, match="there is no model"),
        answering([sys.executable, "-c", program], tmp_path / "log"),
    ):
        pass


def test_a_peer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(install_peers, "PEERS", tmp_path)
    with pytest.raises(PeerError, match=r"vllm is not installed.*make peers"):
        peer_python("vllm")


def test_a_peer_that_is_there(tmp_path, monkeypatch):
    for module in (install_peers, peers):
        monkeypatch.setattr(module, "PEERS", tmp_path)
    python = tmp_path / "mine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    with pytest.raises(PeerError):
        peer_python("mine")  # its installation has not ended
    (tmp_path / "mine" / ".installed").touch()
    assert peer_python("mine") == python
