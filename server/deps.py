"""What the HTTP handlers share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from molex.adapter import BARE, Adapter
from server.adapters import ServedAdapter
from server.auth.access import Access
from server.auth.caller import Caller
from server.base import Base
from server.engine import Engine
from server.errors import ErrorKind, ServiceError, model_not_found
from server.tokenization import Prompt

T = TypeVar("T")
DIGEST_HEADER = "x-adapter-digest"


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def access_of(request: Request) -> Access:
    access: Access = request.app.state.access
    return access


EngineDep = Annotated[Engine, Depends(_engine)]
AccessDep = Annotated[Access, Depends(access_of)]


@dataclass(frozen=True)
class Target:
    """What a request's `model` names to its caller: an adapter on its base, or a bare base."""

    name: str
    base: Base
    adapter: Adapter
    caller: Caller

    @property
    def digest(self) -> str | None:
        """Of the adapter; None for a bare base."""
        return self.adapter.digest or None

    @property
    def headers(self) -> dict[str, str]:
        return {DIGEST_HEADER: self.adapter.digest} if self.adapter.digest else {}


def visible(engine: Engine, caller: Caller) -> list[ServedAdapter]:
    """The adapters that a caller may use: its own and those that the operator shares."""
    return [served for served in engine.adapters.all() if caller.may_see(served.name)]


def find_adapter(engine: Engine, caller: Caller, name: str) -> ServedAdapter | None:
    """What a name means to a caller: an adapter of its own, or else a shared one."""
    known = (full_name for full_name in caller.names(name) if full_name in engine.adapters)
    full_name = next(known, None)
    return None if full_name is None else engine.adapters.get(full_name)


def find_target(engine: Engine, caller: Caller, model: str) -> Target:
    """Raises ServiceError (404) where no base and no adapter of this name is there for the caller."""
    if model in engine.bases:
        return Target(model, engine.bases[model], BARE, caller)
    served = find_adapter(engine, caller, model)
    if served is None:
        raise model_not_found(model)
    return Target(model, engine.bases[served.base], served.adapter, caller)


def classifier(engine: Engine, caller: Caller, model: str) -> Target:
    """The target, which has to classify."""
    target = find_target(engine, caller, model)
    if target.adapter.head is None:
        what = "a bare base" if target.adapter is BARE else "an adapter for generation"
        message = f"{model!r} is {what}, which has no classes; name a classification adapter"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    return target


def encoder(engine: Engine, caller: Caller, model: str) -> Target:
    """The target, which has to be a bare encoder."""
    target = find_target(engine, caller, model)
    if target.adapter is not BARE:
        message = f"{model!r} is an adapter; embeddings come from a bare encoder"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    if target.base.model.spec.generates:
        message = f"{model!r} is a base for generation; embeddings come from a bare encoder"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    return target


def generator(engine: Engine, caller: Caller, model: str) -> Target:
    """The target, which has to generate."""
    target = find_target(engine, caller, model)
    if target.adapter.head is not None:
        message = f"{model!r} is a classification adapter; send it to /v1/classify"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    if not target.base.model.spec.generates:
        message = f"{model!r} is a bare encoder, which generates no text"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    return target


def check_count(engine: Engine, count: int, param: str) -> None:
    """Raises ServiceError where a request has more inputs than allowed."""
    limit = engine.settings.max_inputs
    if count > limit:
        message = f"{param} has {count} entries; the limit is {limit}"
        raise ServiceError(ErrorKind.INVALID_REQUEST, message, param=param)


async def spend_tokens(request: Request, caller: Caller, prompts: Seq[Prompt], limit: int = 0) -> None:
    """Count prompts, and `limit` tokens after each, against the caller's quota. Raises ServiceError."""
    tokens = sum(len(prompt.token_ids) + limit for prompt in prompts)
    await access_of(request).quotas.tokens(caller, tokens)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServiceError(ErrorKind.CLIENT_GONE, "the client has closed the connection")
        return task.result()
    finally:
        task.cancel()
        departure.cancel()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
