"""The HTTP application around an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from server.engine import Engine
from server.routes import (
    adapters,
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
from server.routes.middleware import BodyLimit, Observer


def create_app(engine: Engine) -> FastAPI:
    """The application. It starts the engine when it starts and stops it when it stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    # FastAPI itself would have browsers fetch the scripts of /docs from a public server.
    app = FastAPIOffline(
        title="MoLEx serve",
        version=version("molex-serve"),
        description="Classification, generation and embeddings: many MoLEx and LoRA adapters on one base.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.engine = engine
    for module in (classify, embeddings, completions, chat, models, adapters, health, tei, v2, vllm):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=engine.settings.max_body_bytes)
    app.add_middleware(Observer, metrics=engine.metrics)
    return app
