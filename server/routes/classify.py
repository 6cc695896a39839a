"""`POST /v1/classify`."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from molex.routing import flat_route
from server.deps import EngineDep, Target, check_count, classifier, unless_disconnected
from server.routes.timing import Stopwatch
from server.schemas import ClassifyRequest
from server.sequence import Sequence, Timings

router = APIRouter(tags=["classification"])


class Classification(BaseModel):
    """The answer for one input. `routes`: the layer that each mixed depth chose (two of them for top-2)."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    routes: list[int | tuple[int, ...]] | None = None


class ClassifyUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class ClassifyResponse(BaseModel):
    """vLLM's answer, with the digest of the adapter that gave it."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classification]
    usage: ClassifyUsage
    adapter_digest: str


@router.post("/v1/classify", response_model_exclude_none=True)
async def classify(
    body: ClassifyRequest, request: Request, response: Response, engine: EngineDep
) -> ClassifyResponse:
    """Classify one or more texts with an adapter."""
    watch = Stopwatch()
    check_count(engine, len(body.inputs), "input")
    target = classifier(engine, body.model)
    prompts = await engine.in_pool(target.base.tokenization.encode, body.inputs, "input")
    watch.tokenization_done()
    sequences = [
        Sequence(
            base=target.base.name,
            adapter=target.adapter,
            token_ids=prompt.token_ids,
            token_type_ids=prompt.token_type_ids,
            index=index,
            timings=Timings(watch.created),
        )
        for index, prompt in enumerate(prompts)
    ]
    submission = engine.submit(sequences)
    try:
        await unless_disconnected(request, submission.finished())
    finally:
        submission.cancel()
    response.headers.update(target.headers | watch.record(request, engine, sequences))
    return _answer(target, sequences, return_routes=body.return_routes)


def _answer(target: Target, sequences: list[Sequence], *, return_routes: bool) -> ClassifyResponse:
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    return ClassifyResponse(
        id=f"classify-{uuid4().hex}",
        created=int(time.time()),
        model=target.name,
        data=[_classification(sequence, return_routes=return_routes) for sequence in sequences],
        usage=ClassifyUsage(prompt_tokens=tokens, total_tokens=tokens),
        adapter_digest=target.adapter.digest,
    )


def _classification(sequence: Sequence, *, return_routes: bool) -> Classification:
    best = max(range(len(sequence.probs)), key=sequence.probs.__getitem__)
    extra: dict[str, Any] = {"routes": flat_route(sequence.route or ())} if return_routes else {}
    return Classification(
        index=sequence.index,
        label=sequence.adapter.id2label[best],
        probs=sequence.probs,
        num_classes=len(sequence.probs),
        **extra,
    )
