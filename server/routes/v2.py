"""The Open Inference Protocol (v2) over HTTP, as Triton and KServe speak it.

A model is a classification adapter or a bare encoder. Its one version is the digest of its weights. The name
of a tenant's adapter may have the tenant in it, `TENANT/NAME`, with the slash as it is or as `%2F`.
"""

from __future__ import annotations

import json
from importlib.metadata import version as package_version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from server.deps import EngineDep, LoadsDep, Target, encoder, find_target, visible
from server.errors import ErrorKind, ServiceError
from server.routes.access import OPEN, Infer, ReadAdapters, WriteAdapters
from server.routes.adapters import Name, load_source
from server.routes.answers import InferResponse, V2Error
from server.routes.bodies import B, parse
from server.routes.embeddings import normalized
from server.routes.errors import error_answers, error_route
from server.routes.prompts import run_prompts
from server.schemas import Body, ModelName, Source
from server.sequence import Sequence
from server.tensors import InferRequest, OutputTensor, read_texts
from server.tokenization import TextOrPair

HEADER_LENGTH = "inference-header-content-length"
"""Of a body with binary tensors: the number of bytes of its JSON."""

Json = dict[str, Any]

NO_BODY: dict[int | str, Json] = {503: {"description": "Not now"}}
"""The other answer of probes."""
Version = Annotated[str, Field(max_length=64)]
"""The hexadecimal digits of a digest."""


def _spell(error: ServiceError) -> Response:
    return JSONResponse({"error": error.message}, error.kind.status, headers=error.headers)


router = APIRouter(
    tags=["open-inference-protocol"], route_class=error_route(_spell), responses=error_answers(V2Error)
)


class ServerMetadata(BaseModel):
    name: str = "molex-serve"
    version: str
    extensions: list[str] = ["binary_tensor_data", "model_repository"]


class TensorMetadata(BaseModel):
    """A shape of −1 is the number of inputs of a request."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str = "molex"
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelIndex(BaseModel):
    """A model that is loaded."""

    name: str
    version: str
    state: str = "READY"
    reason: str = ""


class IndexRequest(Body):
    """`POST /v2/repository/index`. What is not loaded is not listed, whatever `ready` says."""

    ready: bool = False


class LoadParameters(Body):
    source: Source | None = None
    base: ModelName | None = None


class LoadRequest(Body):
    """`POST /v2/repository/models/{model}/load`: from the folder `source`, by default that of its name."""

    parameters: LoadParameters = LoadParameters()


class UnloadParameters(Body):
    unload_dependents: bool = False


class UnloadRequest(Body):
    """`POST /v2/repository/models/{model}/unload`. Adapters have no dependents."""

    parameters: UnloadParameters = UnloadParameters()


BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
"""JSON and what follows it, in the OpenAPI document."""


def _documented(body: type[Body], **other: Json) -> Json:
    """Shows in the OpenAPI document a body that the handler reads itself, and what else it may be."""
    schema = body.model_json_schema()
    content = {"application/json": {"schema": _inlined(schema, schema.pop("$defs", {}))}, **other}
    return {"openapi_extra": {"requestBody": {"content": content}}}


def _inlined(schema: Any, definitions: Json) -> Any:
    """A schema with what it refers to in its place."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


INFERENCE: Json = {
    "responses": {200: {"model": InferResponse, "content": BINARY}},
    **_documented(InferRequest, **BINARY),
}
HeaderLength = Annotated[str | None, Header(alias=HEADER_LENGTH, max_length=20)]


async def _target(
    engine: EngineDep, caller: Infer, model: ModelName, version: Version | None = None
) -> Target:
    """What can be inferred with. Raises ServiceError, 404 for a version that is not there (any more)."""
    target = find_target(engine, caller, model)
    if not target.classifies:
        target = encoder(engine, caller, model)
    if version not in (None, _version(target)):
        message = f"{model!r} has no version {version!r}; it has {_version(target)}"
        raise ServiceError(ErrorKind.MODEL_NOT_FOUND, message, param="version")
    return target


TargetDep = Annotated[Target, Depends(_target)]


@router.get("/v2", dependencies=[OPEN])
async def server_metadata() -> ServerMetadata:
    """This server and the extensions of the protocol that it has."""
    return ServerMetadata(version=package_version("molex-serve"))


@router.get("/v2/health/live", response_class=Response, responses=NO_BODY, dependencies=[OPEN])
async def live() -> Response:
    """200 while the event loop runs."""
    return Response()


@router.get("/v2/health/ready", response_class=Response, responses=NO_BODY, dependencies=[OPEN])
async def ready(engine: EngineDep) -> Response:
    """200 while new requests are welcome."""
    return Response(status_code=200 if engine.ready else 503)


# A name may have a slash: what comes after it is to be tried before the name alone.
@router.get("/v2/models/{model:path}/ready", response_class=Response, responses=NO_BODY)
@router.get("/v2/models/{model:path}/versions/{version}/ready", response_class=Response, responses=NO_BODY)
async def model_ready(_: TargetDep, engine: EngineDep) -> Response:
    """200 while requests for the model are welcome."""
    return await ready(engine)


@router.get("/v2/models/{model:path}")
@router.get("/v2/models/{model:path}/versions/{version}")
async def model_metadata(target: TargetDep) -> ModelMetadata:
    """The tensors of a model."""
    names = ["text", "text_pair"] if target.classifies else ["text"]
    return ModelMetadata(
        name=target.name,
        versions=[_version(target)],
        inputs=[TensorMetadata(name=name, datatype="BYTES", shape=[-1]) for name in names],
        outputs=[
            TensorMetadata(name=output.name, datatype=output.datatype, shape=[-1, *output.shape[1:]])
            for output in _outputs(target, [])
        ],
    )


@router.post("/v2/models/{model:path}/infer", **INFERENCE)
@router.post("/v2/models/{model:path}/versions/{version}/infer", **INFERENCE)
async def infer(
    target: TargetDep, request: Request, engine: EngineDep, json_length: HeaderLength = None
) -> Response:
    """Classify or embed the BYTES tensor `text`; of pairs, `text_pair` has the second texts."""
    text, binary = _without_binary(await request.body(), json_length)
    body = _parse(InferRequest, text)
    headers = Response()
    inputs = _inputs(read_texts(body.inputs, binary), target)
    sequences = await run_prompts(engine, target, inputs, request, headers, param="inputs")
    content, binary = _spelled(body, {output.name: output for output in _outputs(target, sequences)})
    head = {"model_name": target.name, "model_version": _version(target)}
    answer = head | ({} if body.id is None else {"id": body.id}) | {"outputs": content}
    timing = {name: value for name, value in headers.headers.items() if name.startswith("x-")}
    if not binary:
        return JSONResponse(answer, headers=timing)
    text = json.dumps(answer).encode()
    return Response(
        text + binary,
        media_type="application/octet-stream",
        headers=timing | {HEADER_LENGTH: str(len(text))},
    )


@router.post("/v2/repository/index", **_documented(IndexRequest))
async def repository_index(request: Request, engine: EngineDep, caller: ReadAdapters) -> list[ModelIndex]:
    """The bases and adapters that are loaded, those for generation too."""
    _parse(IndexRequest, await request.body())
    versions = {name: base.model.spec.digest for name, base in engine.bases.items()}
    versions |= {served.name: served.digest for served in visible(engine, caller)}
    return [ModelIndex(name=name, version=_hex(digest)) for name, digest in versions.items()]


@router.post("/v2/repository/models/{model:path}/load", response_class=Response, **_documented(LoadRequest))
async def load_model(model: Name, request: Request, loads: LoadsDep, caller: WriteAdapters) -> Response:
    """Load an adapter, or a new version of the one of this name."""
    parameters = _parse(LoadRequest, await request.body()).parameters
    source = parameters.source or model.rpartition("/")[2]
    load = await load_source(loads, caller, model, source, parameters.base)
    await load.wait(None)
    return Response()


@router.post(
    "/v2/repository/models/{model:path}/unload", response_class=Response, **_documented(UnloadRequest)
)
async def unload_model(model: Name, request: Request, loads: LoadsDep, caller: WriteAdapters) -> Response:
    """Stop serving an adapter; requests in flight finish."""
    _parse(UnloadRequest, await request.body())
    await loads.remove(caller, model)
    return Response()


def _version(target: Target) -> str:
    return _hex(target.digest or target.base.model.spec.digest)


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _without_binary(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    """The JSON of a body and the bytes that follow it."""
    if json_length is None:
        return body, b""
    if not json_length.isascii() or not json_length.isdigit() or int(json_length) > len(body):
        message = f"{HEADER_LENGTH} is not the number of bytes of the JSON in the body"
        raise ServiceError(ErrorKind.INVALID_REQUEST, message, param=HEADER_LENGTH)
    return body[: int(json_length)], body[int(json_length) :]


def _parse(kind: type[B], text: bytes) -> B:
    """A body that comes without a content type, as the protocol's clients send it; an empty one is {}."""
    return parse(kind, text or b"{}")


def _inputs(texts: dict[str, list[str]], target: Target) -> list[TextOrPair]:
    """Each text, or pair of texts."""
    first, second = texts.get("text"), texts.get("text_pair")
    if not first:
        raise ServiceError(ErrorKind.INVALID_REQUEST, "inputs: there is no text", param="inputs")
    if second is None:
        return [*first]
    if not target.classifies or len(first) != len(second):
        message = f"inputs: {len(first)} texts and {len(second)} of text_pair make no pairs for {target.name}"
        raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="inputs")
    return [[*pair] for pair in zip(first, second, strict=True)]


def _outputs(target: Target, sequences: list[Sequence]) -> list[OutputTensor]:
    """All tensors that a model has to give."""
    count = len(sequences)
    served = target.served
    if served is None:
        vectors = [number for sequence in sequences for number in normalized(sequence.embedding)]
        return [OutputTensor("embedding", "FP32", (count, target.base.model.spec.hidden_size), vectors)]
    shape = (count, len(served.labels))
    if served.config.regression:
        return [OutputTensor("score", "FP32", (count, 1), [s.scores[0] for s in sequences])]
    return [
        OutputTensor("probabilities", "FP32", shape, [p for s in sequences for p in s.probs]),
        OutputTensor("logits", "FP32", shape, [score for s in sequences for score in s.scores]),
        OutputTensor("label", "BYTES", (count,), [s.label for s in sequences]),
    ]


def _spelled(body: InferRequest, outputs: dict[str, OutputTensor]) -> tuple[list[Json], bytes]:
    """The outputs that are asked for, by default all: their JSON, and the bytes that follow it."""
    requested = {output.name: output for output in body.outputs or ()}
    if unknown := requested.keys() - outputs.keys():
        message = f"outputs: there is no {min(unknown)!r}, only {', '.join(outputs)}"
        raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="outputs")
    content, binary = [], b""
    for name in requested or outputs:
        output = outputs[name]
        if body.wants_binary(requested.get(name)):
            data = output.to_bytes()
            content.append(output.head() | {"parameters": {"binary_data_size": len(data)}})
            binary += data
        else:
            content.append(output.head() | {"data": list(output.values)})
    return content, binary
