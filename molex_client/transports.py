"""What differs between the blocking client and the asynchronous one: how they wait."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, Protocol

import httpx

CONNECT_SECONDS = 5.0


def timeouts(seconds: float) -> httpx.Timeout:
    """The server may be silent for `seconds`; one that accepts no connection is given up on earlier."""
    return httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))


class Transport(Protocol):
    """Sends requests, reads files and waits."""

    @property
    def http(self) -> httpx.Client | httpx.AsyncClient:
        """Builds requests, and holds the connections."""

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        """The response; of a `stream` only the head has been read. Raises httpx.HTTPError."""

    async def read(self, response: httpx.Response) -> None:
        """Read the rest of a response. Raises httpx.HTTPError."""

    async def read_file(self, path: Path) -> bytes:
        """What a file holds. Raises OSError."""

    async def sleep(self, seconds: float) -> None: ...

    async def aclose(self) -> None:
        """Close all connections."""


class BlockingTransport:
    """Blocks the thread. Its coroutines never wait for an event loop, so none is needed to run them."""

    def __init__(self, **options: Any) -> None:
        self.http = httpx.Client(**options)

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        return self.http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def read_file(self, path: Path) -> bytes:
        return path.read_bytes()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def aclose(self) -> None:
        self.http.close()


class AsyncTransport:
    """Waits in the event loop of asyncio."""

    def __init__(self, **options: Any) -> None:
        self.http = httpx.AsyncClient(**options)

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        return await self.http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    async def read_file(self, path: Path) -> bytes:
        return await asyncio.to_thread(path.read_bytes)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        await self.http.aclose()
