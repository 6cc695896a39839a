"""Around every request: its id, its log line, its metrics, and the answer when our code fails."""

from __future__ import annotations

import asyncio
import logging
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ErrorKind, internal_error
from server.metrics import Metrics
from server.routes.errors import answer
from server.routes.timing import route_template
from server.routes.uploads import brings_files
from server.settings import Settings

PROBES = ("/livez", "/readyz", "/metrics")
"""Routes that machines ask every few seconds; their log lines are for debugging only."""

UPLOAD_EXTRA = 2_097_152
"""What an upload may have besides its weights: a configuration, and what multipart adds."""

log = logging.getLogger("server.access")


class Observer:
    """Counts, times and logs requests; turns an unexpected exception into a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = perf_counter()
        request_id = uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["begun"] = asyncio.get_running_loop().time()
        status = 0

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except Exception:
            log.exception("request %s failed", request_id)
            if status:
                raise
            await answer(internal_error())(scope, receive, observed_send)
        finally:
            self._report(scope, request_id, status or 499, perf_counter() - begin)

    def _report(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = route_template(scope)
        self._metrics.request(route, status, seconds)
        log.log(
            logging.DEBUG if route in PROBES else logging.INFO,
            "%s %r %d in %.1f ms",
            scope["method"],
            scope["path"],
            status,
            1000 * seconds,
            extra={
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "milliseconds": round(1000 * seconds, 1),
            },
        )


class BodyLimit:
    """Refuses bodies that are too large, slow or packed, or whose client leaves, when they are read.

    So the route that reads one spells the refusal in its own shape. It is an HTTPException: FastAPI takes any
    other failure to read a body for a bad request.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, limit = Headers(scope=scope), self._settings.max_body_bytes
        if _is_upload(scope, headers):
            limit = self._settings.max_adapter_bytes + UPLOAD_EXTRA
        message = f"the body has more than {limit} bytes"
        # The HTTP parser has refused a header that is no number.
        announced = int(headers.get("content-length", "0"))
        too_large = HTTPException(ErrorKind.TOO_LARGE.status, message)
        packed = headers.get("content-encoding", "identity") != "identity"
        deadline = scope["state"]["begun"] + self._settings.max_client_seconds
        size, complete = 0, False

        async def receive_within_limits() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            if packed:
                raise HTTPException(400, "content-encoding is not supported: send the body as it is")
            if announced > limit:
                raise too_large
            part = await self._in_time(receive, deadline)
            if part["type"] == "http.disconnect":
                raise HTTPException(ErrorKind.CLIENT_GONE.status, "the client left before its body ended")
            size += len(part.get("body", b""))
            complete = not part.get("more_body", False)
            if size > limit:
                raise too_large
            return part

        await self._app(scope, receive_within_limits, send)

    async def _in_time(self, receive: Receive, deadline: float) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            message = f"the body took more than {self._settings.max_client_seconds:g} seconds"
            # What is still to come of it would be taken for the next request.
            raise HTTPException(ErrorKind.SLOW_BODY.status, message, {"connection": "close"}) from None


def _is_upload(scope: Scope, headers: Headers) -> bool:
    """Whether a request brings the files of an adapter."""
    return scope["method"] == "PUT" and scope["path"].startswith("/v1/adapters/") and brings_files(headers)
