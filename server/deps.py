"""What the HTTP handlers share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from server.auth.access import Access
from server.auth.caller import Caller
from server.base import Base
from server.engine import Engine
from server.errors import ErrorKind, ServiceError, model_not_found
from server.registry.loads import Loads
from server.registry.registry import Registry
from server.served import ServedAdapter
from server.tokenization import Prompt

T = TypeVar("T")
DIGEST_HEADER = "x-adapter-digest"


def access_of(request: Request) -> Access:
    access: Access = request.app.state.access
    return access


def engine_of(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def _engine(request: Request) -> Engine:
    return engine_of(request)


async def _access(request: Request) -> Access:
    return access_of(request)


async def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


async def _loads(request: Request) -> Loads:
    loads: Loads = request.app.state.loads
    return loads


EngineDep = Annotated[Engine, Depends(_engine)]
AccessDep = Annotated[Access, Depends(_access)]
RegistryDep = Annotated[Registry, Depends(_registry)]
LoadsDep = Annotated[Loads, Depends(_loads)]


@dataclass(frozen=True)
class Target:
    """What a request's `model` names to its caller: an adapter on its base, or, without one, the base."""

    name: str
    base: Base
    served: ServedAdapter | None
    caller: Caller

    @property
    def classifies(self) -> bool:
        return self.served is not None and self.served.classifies

    @property
    def digest(self) -> str | None:
        """Of the adapter; None for a bare base."""
        return self.served.digest if self.served else None

    @property
    def headers(self) -> dict[str, str]:
        return {DIGEST_HEADER: self.served.digest} if self.served else {}


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
        return Target(model, engine.bases[model], None, caller)
    served = find_adapter(engine, caller, model)
    if served is None:
        raise model_not_found(model)
    return Target(model, engine.bases[served.base], served, caller)


def classifier(engine: Engine, caller: Caller, model: str) -> Target:
    """The target, which has to classify."""
    target = find_target(engine, caller, model)
    if not target.classifies:
        what = "an adapter for generation" if target.served else "a bare base"
        message = f"{model!r} is {what}, which has no classes; name a classification adapter"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    return target


def encoder(engine: Engine, caller: Caller, model: str) -> Target:
    """The target, which has to be a bare encoder."""
    target = find_target(engine, caller, model)
    if target.served is not None:
        message = f"{model!r} is an adapter; embeddings come from a bare encoder"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    if target.base.model.spec.generates:
        message = f"{model!r} is a base for generation; embeddings come from a bare encoder"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    return target


def generator(engine: Engine, caller: Caller, model: str) -> Target:
    """The target, which has to generate."""
    target = find_target(engine, caller, model)
    if target.classifies:
        message = f"{model!r} is a classification adapter; send it to /v1/classify"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    if not target.base.model.spec.generates:
        message = f"{model!r} is a bare encoder, which generates no text"
        raise ServiceError(ErrorKind.WRONG_TASK, message, param="model")
    return target


def classifiers(engine: Engine, caller: Caller) -> list[str]:
    return [served.name for served in visible(engine, caller) if served.classifies]


def encoders(engine: Engine) -> list[str]:
    return [name for name, base in engine.bases.items() if not base.model.spec.generates]


def only(names: list[str], how: str) -> str:
    """The one name there is to choose, where a request has none. Raises ServiceError (404).

    `how` tells the client how to name a model.
    """
    if len(names) == 1:
        return names[0]
    message = f"{len(names)} models fit: name one {how}"
    raise ServiceError(ErrorKind.MODEL_NOT_FOUND, message, param="model")


def check_count(engine: Engine, count: int, param: str, what: str = "entries") -> None:
    """Raises ServiceError where a request has more inputs, or asks for more choices, than allowed."""
    limit = engine.settings.max_inputs
    if count > limit:
        message = f"{param}: {count} {what}; the limit is {limit}"
        raise ServiceError(ErrorKind.TOO_MANY_INPUTS, message, param=param)


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
