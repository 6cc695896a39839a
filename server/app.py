"""The HTTP application around an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.auth.access import Access
from server.engine import Engine
from server.registry.follower import Follower
from server.registry.loads import Loads
from server.registry.registry import Registry
from server.routes import (
    adapters,
    administration,
    chat,
    classify,
    completions,
    embeddings,
    errors,
    health,
    models,
    tei,
    v2,
    vllm,
)
from server.routes.access import Authentication, register
from server.routes.answers import ErrorAnswer
from server.routes.middleware import BodyLimit, Observer


def create_app(engine: Engine, access: Access) -> FastAPI:
    """The application. It starts the engine and access when it starts and stops them when it stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await access.start()
        await engine.start()
        await registry.open()
        loads.resume()
        async with access.watching():
            yield
        await follower.stop()
        await loads.stop()
        await engine.stop()
        await registry.close()
        await access.stop()

    registry = Registry(engine, access.shared_catalogue)
    loads = Loads(registry)
    follower = Follower(registry)
    if access.changes is not None:
        access.changes.listeners.append(follower.changed)
    # FastAPI itself would have browsers fetch the scripts of /docs from a public server.
    app = FastAPIOffline(
        title="MoLEx serve",
        version=version("molex-serve"),
        description="Classification, generation and embeddings: many MoLEx and LoRA adapters on one base.",
        lifespan=lifespan,
        responses=errors.error_answers(ErrorAnswer),
        redoc_url=None,
    )
    app.state.engine = engine
    app.state.access = access
    app.state.registry = registry
    app.state.loads = loads
    for module in (
        classify,
        embeddings,
        completions,
        chat,
        models,
        adapters,
        administration,
        health,
        tei,
        v2,
        vllm,
    ):
        register(app, module.router)
    register(app, adapters.vllm_verbs)
    errors.install(app)
    app.add_middleware(Authentication, access=access)
    app.add_middleware(BodyLimit, settings=engine.settings)
    app.add_middleware(Observer, metrics=engine.metrics)
    return app
