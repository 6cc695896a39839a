"""Probes and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from server.deps import EngineDep
from server.metrics import CONTENT_TYPE
from server.routes.access import OPEN, ReadMetrics
from server.routes.errors import text_answers

router = APIRouter(tags=["operations"])


@router.get("/livez", response_class=Response, responses=text_answers(200, 503), dependencies=[OPEN])
async def livez(engine: EngineDep) -> Response:
    """200 while the worker runs. 503 means: restart this process."""
    return _probe(engine.alive, "the worker has died")


@router.get("/readyz", response_class=Response, responses=text_answers(200, 503), dependencies=[OPEN])
async def readyz(engine: EngineDep) -> Response:
    """200 while new requests are welcome. 503 means: send them elsewhere."""
    return _probe(engine.ready, "not ready")


@router.get("/metrics", response_class=Response, responses=text_answers(200))
async def metrics(engine: EngineDep, _: ReadMetrics) -> Response:
    """Metrics for Prometheus."""
    return Response(engine.metrics.render(), media_type=CONTENT_TYPE)


def _probe(good: bool, problem: str) -> Response:
    return PlainTextResponse("ok" if good else problem, 200 if good else 503)
