"""A real molex-serve on tiny bases, and a server that answers by a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Event, Thread
from typing import Any

import pytest

from molex_client import AsyncClient, Client
from tests.server.conftest import adapters_folder, bases, live, make_adapters, models, settings

__all__ = ["adapters_folder", "bases", "live", "make_adapters", "models", "settings"]

Call = Callable[..., Any]


@pytest.fixture(params=["blocking", "async"])
def call(request) -> Call:
    """Calls a method of either client: `call(url, "classify", …)`; `options` are the client's."""

    def blocking(
        url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **named: Any
    ) -> Any:
        with Client(url, **(options or {})) as client:
            answer = getattr(client, method)(*args, **named)
            return list(answer) if method.startswith("stream_") else answer

    async def asynchronous(
        url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **named: Any
    ) -> Any:
        async with AsyncClient(url, **(options or {})) as client:
            answer = await getattr(client, method)(*args, **named)
            return [piece async for piece in answer] if method.startswith("stream_") else answer

    if request.param == "blocking":
        return blocking
    return lambda *args, **named: asyncio.run(asynchronous(*args, **named))


@dataclass
class Script:
    """Answers each request with the next of `answers`: bytes, or None to be silent until the end."""

    answers: list[bytes | None] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    """Of the requests that have come: their lines and headers."""
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""
    over: Event = field(default_factory=Event)

    def handle(self, handler: StreamRequestHandler) -> None:
        head = b""
        while (line := handler.rfile.readline()).strip():
            head += line
        if not head:
            return
        text = head.decode().lower()
        self.heads.append(text)
        [length] = [int(part[15:]) for part in text.splitlines() if part.startswith("content-length:")] or [0]
        self.bodies.append(handler.rfile.read(length))
        answer = self.answers.pop(0)
        if answer is None:
            self.over.wait(60)
        else:
            handler.wfile.write(answer)


def answer(status: int, content: object = None, **headers: str) -> bytes:
    """A response that ends with its connection."""
    body = json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} Said", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def event_stream(*events: bytes) -> bytes:
    """A response of server-sent events; only the end of the connection ends it."""
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: r1\r\nconnection: close\r\n\r\n"
    )
    return head + b"".join(b"data: " + event + b"\n\n" for event in events)


@pytest.fixture
def script() -> Iterator[Script]:
    told = Script()

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            told.handle(self)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        told.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield told
        told.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """How long clients have paused; they don't really."""
    made: list[float] = []

    async def pause(self: object, seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr("molex_client.transports.BlockingTransport.sleep", pause)
    monkeypatch.setattr("molex_client.transports.AsyncTransport.sleep", pause)
    return made
