"""A real server on tiny random bases: an encoder `enc` and a decoder `dec`, with adapters for both."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from molex import MolexModel, write_adapter
from scripts.postgres import find_binaries, private_cluster
from server.auth.access import Access
from server.catalogue.database import migrate
from server.catalogue.url import parse_url
from server.cli import Server
from server.engine import Engine
from server.registry.registry import Registry
from server.runner import StepOutput
from server.sequence import Sequence
from server.settings import Settings
from tests.tiny import molex_config, random_adapter, relabel, tiny_base

DEPTHS = (0, 2, 4)
PEPPER = "a pepper of the tests, which is long enough"
NUMBERS = count()


@dataclass
class Live:
    """A running server and what it serves."""

    engine: Engine
    url: str
    admin_url: str
    """Of the second listener, or else of the only one."""
    http: httpx.Client
    server: Server

    @property
    def registry(self) -> Registry:
        return self.server.config.app.state.registry

    def post(self, path: str, body: Any) -> httpx.Response:
        """Unlike httpx itself, this can send half a surrogate pair."""
        headers = {"content-type": "application/json"}
        return self.http.post(path, content=json.dumps(body), headers=headers)

    def classify(self, **body: Any) -> httpx.Response:
        return self.post("/v1/classify", body)

    def embed(self, **body: Any) -> httpx.Response:
        return self.post("/v1/embeddings", body)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", body)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", body)

    def load(self, name: str, source: str, **body: Any) -> httpx.Response:
        """Load an adapter, or replace the one of this name, and wait until it is served or refused."""
        return self.http.put(f"/v1/adapters/{name}?wait=60", json={"source": source} | body)

    def unload(self, name: str) -> httpx.Response:
        return self.http.delete(f"/v1/adapters/{name}")

    def send(self, path: str, body: Any, *, cut: int = 0) -> socket.socket:
        """Send a request, without its last `cut` bytes, for a client that will not wait for the answer.

        Whoever reads on after the answer finds the end of the connection there.
        """
        content = json.dumps(body)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(content)}\r\n\r\n{content}".encode()
        url = httpx.URL(self.url)
        connection = socket.create_connection((url.host, url.port))
        connection.sendall(request[: len(request) - cut])
        return connection

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels, as they are printed."""
        lines = self.http.get("/metrics").text.splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in samples}


class _Announced(Server):
    """Tells the test when it listens, and where."""

    listening = Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    def url(self, listener: int) -> str:
        host, port = self.servers[listener].sockets[0].getsockname()
        return f"http://{host}:{port}"


@contextmanager
def live_server(settings: Settings) -> Iterator[Live]:
    """Run a server in a thread; stop it, requests and all, in the end."""
    engine = Engine.load(settings)
    refused = engine.adapters.load_folder(settings.adapters) if settings.adapters else {}
    server = _Announced(engine, Access.load(settings), refused)
    server.listening = Event()
    thread = Thread(target=lambda: asyncio.run(server.serve()), name="server")
    thread.start()
    assert server.listening.wait(60)
    try:
        with httpx.Client(base_url=server.url(0), timeout=60) as http:
            yield Live(engine, server.url(0), server.url(-1), http, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "enc": tiny_base("roberta", folder / "enc"),
        "dec": tiny_base("llama", folder / "dec", seed=1),
    }


@pytest.fixture(scope="session")
def models(bases) -> dict[str, MolexModel]:
    return {name: MolexModel.from_pretrained(folder) for name, folder in bases.items()}


@pytest.fixture(scope="session")
def make_adapters(models) -> Callable[[Path], Path]:
    """Writes the standard adapters into a folder."""
    enc, dec = models["enc"].spec, models["dec"].spec
    mixture = molex_config(DEPTHS)
    adapters = {
        "mood": relabel(random_adapter(enc, seed=1, molex=mixture), ["bad", "fair", "good"]),
        "topic": random_adapter(enc, seed=2, r=2, num_labels=4),
        "rank2": random_adapter(enc, seed=3, molex=molex_config(DEPTHS, top_k=2)),
        "writer": random_adapter(dec, seed=4, task="CAUSAL_LM", molex=mixture),
        "poet": random_adapter(dec, seed=5, task="CAUSAL_LM", r=2),
        "judge": random_adapter(dec, seed=6, molex=mixture),
    }

    def write(folder: Path) -> Path:
        for name, adapter in adapters.items():
            write_adapter(adapter, folder / name)
        return folder

    return write


@pytest.fixture(scope="session")
def adapters_folder(make_adapters, tmp_path_factory) -> Path:
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def settings(bases, adapters_folder) -> Settings:
    """float64, in which a sequence's tokens do not depend on the rounding of the batch it runs in."""
    return Settings(
        bases={name: str(folder) for name, folder in bases.items()},
        adapters=adapters_folder,
        port=0,
        precision="fp64",
        max_sequences=4,
        max_queue=64,
        max_inputs=32,
        max_batch_tokens=64,
        grace_seconds=5,
        max_stall_seconds=300,  # Tests hold the worker up.
        log_level="warning",
    )


@pytest.fixture(scope="module")
def live(settings) -> Iterator[Live]:
    """A server that the tests of a module share."""
    with live_server(settings) as server:
        yield server


@pytest.fixture(scope="module")
def chars(settings, tmp_path_factory) -> Iterator[Live]:
    """A server with a decoder whose tokens are characters, which can spell JSON."""
    folder = tiny_base("llama", tmp_path_factory.mktemp("chars"), characters=True)
    changes = {"bases": {"chars": str(folder)}, "adapters": None}
    with live_server(settings.model_copy(update=changes)) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[[Settings], Live]]:
    """Starts servers that belong to one test."""
    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(live_server(settings))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The URL of a running PostgreSQL."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed")
    with private_cluster(binaries) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request, tmp_path) -> sa.URL:
    """An empty database."""
    if request.param == "sqlite":
        return parse_url(f"sqlite:///{tmp_path}/catalogue.db")
    url = parse_url(request.getfixturevalue("cluster"))
    name = f"catalogue_{next(NUMBERS)}"
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.set(database=name)


@pytest.fixture
def url(empty_url) -> sa.URL:
    """A database with the tables of the catalogue."""
    migrate(empty_url)
    return empty_url


class Clock:
    """Time that a test sets, in seconds."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Brake:
    """Holds a base's runner at the beginning of every step until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, live: Live, base: str) -> None:
        runner = live.engine.bases[base].runner
        self.batches: list[tuple[Sequence, ...]] = []
        self.failing = False
        self._live = live
        self._run = runner.run
        self._go = Event()
        monkeypatch.setattr(runner, "run", self._held)

    def _held(self, sequences: tuple[Sequence, ...], part_tokens: int) -> StepOutput:
        self.batches.append(tuple(sequences))
        assert self._go.wait(60)
        if self.failing:
            self.failing = False
            raise RuntimeError("a test breaks this step")
        return self._run(sequences, part_tokens)

    def release(self) -> None:
        """Let every step from now on run."""
        self._go.set()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what another thread is about to do; each look takes one round trip to the server."""
        for _ in range(20_000):
            if condition():
                return
            self._live.http.get("/livez")
        raise AssertionError("it never happened")


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Brake]]:
    """Makes brakes; all are released in the end."""
    made: list[Brake] = []

    def make(live: Live, base: str) -> Brake:
        made.append(Brake(monkeypatch, live, base))
        return made[-1]

    yield make
    for item in made:
        item.release()
