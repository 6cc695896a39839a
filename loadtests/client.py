"""One request to one server, and what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import httpx

from loadtests.dialects import BadAnswerError, Dialect
from loadtests.schedule import Planned

STAGES = {"in queue": "x-queue-time", "in pass": "x-inference-time"}
"""What servers may say of where a request spent its time, by the header that says it, in milliseconds."""
KEEPALIVE_SECONDS = 2
"""Less than servers wait (uvicorn: 5 s), so that no request goes out on a connection that is being closed."""


class Outcome(StrEnum):
    """How a request ended; each ends in one way."""

    OK = "ok"
    HTTP_ERROR = "http error"
    TIMEOUT = "timeout"
    TRANSPORT_ERROR = "transport error"
    BAD_ANSWER = "bad answer"


@dataclass(frozen=True)
class Result:
    """A request that has ended. Times are seconds from the start of its block.

    `status` is None if no status line came. `pieces` are the times at which text of a stream came: one a
    token, except where a server waits for the rest of a character. `stages` are seconds by stage, where the
    server told them.
    """

    model: str
    due: float
    sent: float
    end: float
    outcome: Outcome
    status: int | None
    pieces: tuple[float, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """A connection pool to one server and the dialect it is spoken to in."""

    http: httpx.AsyncClient
    dialect: Dialect
    timeout_seconds: float

    async def send(self, planned: Planned, start: float) -> Result:
        """Send now. `start`: when the block began, in seconds of `time.perf_counter`."""
        sent = time.perf_counter() - start
        status = None
        moments: list[float] = []
        stages: dict[str, float] = {}
        body = self.dialect.body(planned.model, planned.text)
        try:
            async with (
                asyncio.timeout(self.timeout_seconds),
                self.http.stream("POST", self.dialect.path, json=body) as response,
            ):
                status = response.status_code
                if response.is_success:
                    moments = await self.dialect.read(response)
                    stages = _stages(response.headers)
                    outcome = Outcome.OK
                else:
                    await response.aread()
                    outcome = Outcome.HTTP_ERROR
        except TimeoutError:
            outcome = Outcome.TIMEOUT
        except httpx.HTTPError:
            outcome = Outcome.TRANSPORT_ERROR
        except BadAnswerError:
            outcome = Outcome.BAD_ANSWER
        end = time.perf_counter() - start
        pieces = tuple(moment - start for moment in moments)
        return Result(planned.model, planned.due, sent, end, outcome, status, pieces, stages)


def _stages(headers: httpx.Headers) -> dict[str, float]:
    """Raises BadAnswerError where a time is no number."""
    try:
        told = {stage: headers[name] for stage, name in STAGES.items() if name in headers}
        return {stage: float(milliseconds) / 1000 for stage, milliseconds in told.items()}
    except ValueError as error:
        raise BadAnswerError("a time in the headers is no number") from error


class Connections(httpx.AsyncBaseTransport):
    """A connection for each request in flight; those that are free are used again, the latest one first.

    httpx's own pool looks at all of its connections at each request: 4 to 7 ms of CPU time with 64 of them,
    which a server on the same CPUs does not get.
    """

    def __init__(self) -> None:
        self._free: list[httpx.AsyncHTTPTransport] = []
        self._all: list[httpx.AsyncHTTPTransport] = []
        self._tls = httpx.create_ssl_context(trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        connection = self._free.pop() if self._free else self._another()
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            self._free.append(connection)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(response.stream, lambda: self._free.append(connection))
        return response

    async def aclose(self) -> None:
        for connection in self._all:
            await connection.aclose()

    def _another(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, keepalive_expiry=KEEPALIVE_SECONDS)
        connection = httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=limits)
        self._all.append(connection)
        return connection


class _Body(httpx.AsyncByteStream):
    """The body of an answer, whose end is told."""

    def __init__(self, stream: httpx.AsyncByteStream, ended: Callable[[], None]) -> None:
        self._stream = stream
        self._ended = ended

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._ended()


def connection_pool(url: str) -> httpx.AsyncClient:
    """A pool without a limit: a limit would hold requests back here while a server stalls.

    Proxies of the environment are ignored and redirects are not followed, so that traffic stays on the
    host of the URL.
    """
    return httpx.AsyncClient(base_url=url, transport=Connections(), timeout=None, trust_env=False)
