"""`POST /v1/classify`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from molex.routing import flat_route
from server.deps import EngineDep, classifier
from server.routes.access import Infer
from server.routes.prompts import PromptUsage, run_prompts
from server.schemas import ClassifyRequest
from server.sequence import Sequence

router = APIRouter(tags=["classification"])


class Classification(BaseModel):
    """The answer for one input; of a regression, `probs` holds its one number.

    `routes`: the layer that each mixed depth chose (two of them for top-2).
    """

    index: int
    label: str
    probs: list[float]
    num_classes: int
    routes: list[int | tuple[int, ...]] | None = None


class ClassifyResponse(BaseModel):
    """vLLM's answer, with the digest of the adapter that gave it."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classification]
    usage: PromptUsage
    adapter_digest: str


@router.post("/v1/classify", response_model_exclude_none=True)
async def classify(
    body: ClassifyRequest, request: Request, response: Response, engine: EngineDep, caller: Infer
) -> ClassifyResponse:
    """Classify one or more texts with an adapter."""
    target = classifier(engine, caller, body.model)
    sequences = await run_prompts(engine, target, body.inputs, request, response, priority=body.priority)
    return ClassifyResponse(
        id=f"classify-{request.state.request_id}",
        created=int(time.time()),
        model=target.name,
        data=[_classification(sequence, return_routes=body.return_routes) for sequence in sequences],
        usage=PromptUsage.of(sequences),
        adapter_digest=sequences[0].adapter.digest,
    )


def _classification(sequence: Sequence, *, return_routes: bool) -> Classification:
    extra: dict[str, Any] = {"routes": flat_route(sequence.route or ())} if return_routes else {}
    return Classification(
        index=sequence.index,
        label=sequence.label,
        probs=sequence.probs,
        num_classes=len(sequence.probs),
        **extra,
    )
