"""Which callers a route lets in. Every route declares it; one that does not is never registered.

A handler asks for its caller, `caller: Infer`; one that lets everybody in has `dependencies=[OPEN]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from server.auth.access import Access
from server.auth.caller import Caller
from server.catalogue.records import Scope
from server.deps import access_of, engine_of
from server.errors import ErrorKind, ServiceError, error_of_status, stopping_error, unsupported_parameter
from server.settings import MAX_REQUEST_SECONDS

BEARER = HTTPBearer(auto_error=False, description="An API key, where the server has a catalogue of tenants.")
TIMEOUT_HEADER = "x-request-timeout"
UNCOUNTED = frozenset({Scope.ADMIN, Scope.METRICS})
"""What operators do is not held against the quota of a tenant."""
WORK = frozenset({Scope.INFER, Scope.ADAPTERS_WRITE})
"""What a server that shuts down takes on no more."""


class Needs(SecurityBase):
    """A dependency that lets in callers with a scope, within their quota, and gives the caller.

    While the server shuts down it lets in nobody who asks for more work: 503.

    The OpenAPI document has it as `BEARER`, which need not run: `Authentication` has read the header.
    """

    model = BEARER.model
    scheme_name = BEARER.scheme_name

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        access = access_of(request)
        if not access.answers(self.scope, request.scope["server"][1]):
            raise error_of_status(404, f"Not Found: {request.method} {request.url.path}")
        caller: Caller | ServiceError = request.state.caller
        if isinstance(caller, ServiceError):
            raise caller
        if self.scope not in caller.scopes:
            message = f"the API key has no scope {self.scope}"
            raise ServiceError(ErrorKind.MISSING_SCOPE, message)
        if self.scope in WORK and engine_of(request).draining:
            raise stopping_error()
        _refuse_unknown_query(request)
        if self.scope not in UNCOUNTED:
            await access.quotas.begin(caller, request.state.ending)
        return caller


async def _let_in() -> None:
    """Everybody."""


OPEN = Depends(_let_in)
ReadAdapters = Annotated[Caller, Depends(Needs(Scope.ADAPTERS_READ))]
WriteAdapters = Annotated[Caller, Depends(Needs(Scope.ADAPTERS_WRITE))]
ReadMetrics = Annotated[Caller, Depends(Needs(Scope.METRICS))]
Administer = Annotated[Caller, Depends(Needs(Scope.ADMIN))]


async def _may_infer(
    request: Request,
    caller: Annotated[Caller, Depends(Needs(Scope.INFER))],
    timeout: Annotated[
        float | None, Header(alias=TIMEOUT_HEADER, gt=0, le=MAX_REQUEST_SECONDS, allow_inf_nan=False)
    ] = None,
) -> Caller:
    """A caller of the models, until when its request has to be done: `request.state.deadline`.

    The header says how long the client waits, which the server need not make use of.
    """
    limit = engine_of(request).settings.max_request_seconds
    request.state.deadline = request.state.begun + min(timeout or limit, limit)
    return caller


Infer = Annotated[Caller, Depends(_may_infer)]


def register(app: FastAPI, router: APIRouter) -> None:
    """Add a module's routes to the application.

    Raises TypeError for one that declares nothing, for one that the OpenAPI document leaves out, whose routes
    are tested one by one, and for a dependency that is not async: FastAPI would run it on a thread of its
    own, which takes longer than what dependencies do.
    """
    for route in router.routes:
        if not isinstance(route, APIRoute) or not any(map(_decides, _dependencies(route.dependant))):
            raise TypeError(f"{getattr(route, 'path', route)} declares neither a scope nor OPEN")
        if not route.include_in_schema:
            raise TypeError(f"{route.path} is not in the OpenAPI document")
        for dependency in _dependencies(route.dependant):
            if not _is_async(dependency.call):
                raise TypeError(f"{route.path}: the dependency {dependency.call} is not async")
    app.include_router(router)


def _dependencies(dependant: Dependant) -> Iterator[Dependant]:
    for dependency in dependant.dependencies:
        yield dependency
        yield from _dependencies(dependency)


def _decides(dependency: Dependant) -> bool:
    return dependency.call is _let_in or isinstance(dependency.call, Needs)


def _is_async(call: Any) -> bool:
    function = call if inspect.isfunction(call) else type(call).__call__
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _refuse_unknown_query(request: Request) -> None:
    """Raises ServiceError (400) for a query parameter that the route does not have."""
    if not request.scope["query_string"]:
        return
    dependant = request.scope["route"].dependant
    parts = (dependant, *_dependencies(dependant))
    known = {field.alias for part in parts for field in part.query_params}
    for name in request.query_params:
        if name not in known:
            raise unsupported_parameter(name)


class Authentication:
    """Finds out who sends a request, before its body is read.

    The body of somebody unknown is left unread: whatever they send, parsing it is no way to keep the
    server busy, and the answer is that of `Needs`.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            state["caller"] = await self._access.identify(Headers(scope=scope).get("authorization"))
        except ServiceError as error:
            state["caller"] = error
            receive = _without_body(receive)
        with ExitStack() as state["ending"]:
            await self._app(scope, receive, send)


def _without_body(receive: Receive) -> Receive:
    """What tells of an empty body, and later of the end of the connection."""
    ended = False

    async def receive_no_body() -> Message:
        nonlocal ended
        if not ended:
            ended = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while (message := await receive())["type"] == "http.request":
            pass
        return message

    return receive_no_body
