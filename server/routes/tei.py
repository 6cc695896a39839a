"""The routes of Hugging Face's text-embeddings-inference, for clients that know no adapter names.

A client is given `http://host:port/tei/NAME` as the server's address. At the root the name is a query
parameter, which can be left out where only one adapter or base fits.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.deps import (
    EngineDep,
    Target,
    classifier,
    classifiers,
    encoder,
    encoders,
    find_target,
    only,
)
from server.engine import Engine
from server.errors import ErrorKind, ServiceError
from server.routes.access import OPEN, Infer
from server.routes.answers import TeiError
from server.routes.embeddings import normalized
from server.routes.errors import error_answers, error_route
from server.routes.prompts import run_prompts
from server.schemas import ModelName, TeiEmbedRequest, TeiPredictRequest
from server.sequence import Sequence
from server.tokenization import TextOrPair

STATUS = {
    ErrorKind.EMPTY_INPUT: 400,
    ErrorKind.CONTEXT_LENGTH: 413,
    ErrorKind.TOO_MANY_INPUTS: 413,
    ErrorKind.INTERNAL: 424,
}
"""Where TEI answers with another status than we do; any other 400 becomes 422."""
TIMES = ("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time")
ERROR_TYPES = {400: "Empty", 424: "Backend", 429: "Overloaded", 503: "Unhealthy", 504: "Backend"}
"""Of its errors by status; all others are "Validation"."""
NAMING = "with ?model=NAME or /tei/NAME"
"""How its clients name a model."""


def _status(kind: ErrorKind) -> int:
    return STATUS.get(kind, 422 if kind.status == 400 else kind.status)


def _error(error: ServiceError) -> JSONResponse:
    status = _status(error.kind)
    body = {"error": error.message, "error_type": ERROR_TYPES.get(status, "Validation")}
    return JSONResponse(body, status, headers=error.headers)


router = APIRouter(
    tags=["text-embeddings-inference"],
    route_class=error_route(_error),
    responses=error_answers(TeiError, _status),
)


class Prediction(BaseModel):
    """The score of one label."""

    score: float
    label: str


class Info(BaseModel):
    """What TEI tells of its model and its limits. `model_sha` is the digest of the adapter or base."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool = False
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


# One declaration for both places of the name: in the path where the path has it, else in the query.
async def _classifier(engine: EngineDep, caller: Infer, model: ModelName | None = None) -> Target:
    return classifier(engine, caller, model or only(classifiers(engine, caller), NAMING))


async def _encoder(engine: EngineDep, caller: Infer, model: ModelName | None = None) -> Target:
    return encoder(engine, caller, model or only(encoders(engine), NAMING))


async def _either(engine: EngineDep, caller: Infer, model: ModelName | None = None) -> Target:
    target = find_target(
        engine, caller, model or only(classifiers(engine, caller) or encoders(engine), NAMING)
    )
    return target if target.classifies else encoder(engine, caller, target.name)


@router.post("/predict")
@router.post("/tei/{model:path}/predict")
async def predict(
    body: TeiPredictRequest,
    request: Request,
    response: Response,
    engine: EngineDep,
    target: Annotated[Target, Depends(_classifier)],
) -> list[Prediction] | list[list[Prediction]]:
    """Score every label of one text, one pair of texts, or a batch of either."""
    sequences = await _run(body, request, response, engine, target)
    answers = [_predictions(sequence, raw=body.raw_scores) for sequence in sequences]
    return answers if body.is_batch else answers[0]


@router.post("/embed")
@router.post("/tei/{model:path}/embed")
async def embed(
    body: TeiEmbedRequest,
    request: Request,
    response: Response,
    engine: EngineDep,
    target: Annotated[Target, Depends(_encoder)],
) -> list[list[float]]:
    """Embed texts with a bare encoder: mean pooling, scaled to length 1 unless `normalize` is false."""
    sequences = await _run(body, request, response, engine, target)
    vectors = [sequence.embedding for sequence in sequences]
    return [normalized(vector) for vector in vectors] if body.normalize else vectors


@router.get("/info")
@router.get("/tei/{model:path}/info")
async def info(engine: EngineDep, target: Annotated[Target, Depends(_either)]) -> Info:
    """The model and its limits."""
    settings = engine.settings
    return Info(
        model_id=target.name,
        model_sha=target.digest or target.base.model.spec.digest,
        model_dtype=str(target.base.model.dtype).removeprefix("torch."),
        model_type=_model_type(target),
        max_concurrent_requests=settings.max_queue,
        max_input_length=target.base.tokenization.max_length,
        max_batch_tokens=settings.max_batch_tokens,
        max_client_batch_size=settings.max_inputs,
        tokenization_workers=settings.pool_threads,
        version=version("molex-serve"),
    )


@router.get("/health", response_class=Response, dependencies=[OPEN])
@router.get("/tei/{model:path}/health", response_class=Response, dependencies=[OPEN])
async def health(engine: EngineDep) -> Response:
    """200 while new requests are welcome."""
    if not engine.ready:
        raise ServiceError(ErrorKind.STOPPING, "not ready")
    return Response()


async def _run(
    body: TeiPredictRequest | TeiEmbedRequest,
    request: Request,
    response: Response,
    engine: Engine,
    target: Target,
) -> list[Sequence]:
    """As `run_prompts`, with TEI's headers. What holds no text is refused, as TEI does."""
    batch = body.batch
    if not batch or not all(any(entry) for entry in batch):
        raise ServiceError(ErrorKind.EMPTY_INPUT, "inputs: cannot be empty", param="inputs")
    sequences = await run_prompts(
        engine, target, batch, request, response, param="inputs", truncate=bool(body.truncate)
    )
    response.headers.update(_compute_headers(engine, batch, sequences, response))
    return sequences


def _predictions(sequence: Sequence, *, raw: bool) -> list[Prediction]:
    """All labels, the highest score first."""
    scores = sequence.scores if raw else sequence.probs
    labels = sequence.adapter.id2label
    predictions = [Prediction(score=score, label=labels[i]) for i, score in enumerate(scores)]
    return sorted(predictions, key=lambda prediction: prediction.score, reverse=True)


def _model_type(target: Target) -> dict[str, Any]:
    if target.served is None:
        return {"embedding": {"pooling": "mean"}}
    labels = target.served.labels
    inverse = {label: number for number, label in labels.items()}
    return {"classifier": {"id2label": labels, "label2id": inverse}}


def _compute_headers(
    engine: Engine, inputs: list[TextOrPair], sequences: list[Sequence], response: Response
) -> dict[str, str]:
    """What TEI reports of a request: its times in whole milliseconds, what ran it and what it was made of."""
    texts = [text for entry in inputs for text in ([entry] if isinstance(entry, str) else entry)]
    times = {name: str(int(float(response.headers[name]))) for name in TIMES}
    return times | {
        "x-compute-type": "cpu" if engine.settings.device == "cpu" else "gpu",
        "x-compute-time": times["x-total-time"],
        "x-compute-characters": str(sum(map(len, texts))),
        "x-compute-tokens": str(sum(len(sequence.token_ids) for sequence in sequences)),
    }
