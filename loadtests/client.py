"""One request to one server, and what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
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


def connection_pool(url: str) -> httpx.AsyncClient:
    """A pool without a limit: a limit would hold requests back here while a server stalls.

    Proxies of the environment are ignored and redirects are not followed, so that traffic stays on the
    host of the URL.
    """
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS
    )
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=None, trust_env=False)
