"""Probes and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from server.deps import EngineDep
from server.metrics import CONTENT_TYPE
from server.routes.access import OPEN, ReadMetrics
from server.routes.errors import text_answers

router = APIRouter(tags=["operations"])


@router.get("/livez", response_class=Response, responses=text_answers(200), dependencies=[OPEN])
async def livez() -> Response:
    """200 while the event loop runs. No answer means: restart this process."""
    return PlainTextResponse("ok")


@router.get("/readyz", response_class=Response, responses=text_answers(200, 503), dependencies=[OPEN])
async def readyz(engine: EngineDep) -> Response:
    """200 while new requests are welcome and the worker goes on. 503 means: send them elsewhere."""
    return PlainTextResponse("ok") if engine.ready else PlainTextResponse("not ready", 503)


@router.get("/metrics", response_class=Response, responses=text_answers(200))
async def metrics(engine: EngineDep, _: ReadMetrics) -> Response:
    """Metrics for Prometheus."""
    return Response(engine.metrics.render(), media_type=CONTENT_TYPE)
