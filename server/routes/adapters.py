"""Loading, listing and removing adapters, in our verbs and in vLLM's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from server.adapters import ServedAdapter
from server.deps import DIGEST_HEADER, EngineDep
from server.engine import Engine
from server.errors import ErrorKind, ServiceError
from server.schemas import LoadLoraRequest, PutAdapterRequest, UnloadLoraRequest
from server.settings import NAME_PATTERN

router = APIRouter(tags=["adapters"])
Name = Annotated[str, Path(pattern=NAME_PATTERN)]


class AdapterCard(BaseModel):
    """A served adapter. `source` is its folder as its loader named it.

    `bytes` is what its weights take in memory. `resident` says whether they are there now: if not, the next
    request brings them back. `pinned` ones stay there.
    """

    name: str
    object: str = "adapter"
    base: str
    kind: str
    task: str
    digest: str
    rank: int
    labels: dict[int, str]
    mixed_depths: list[int]
    bytes: int
    resident: bool
    pinned: bool
    source: str
    created: int


class AdapterList(BaseModel):
    object: str = "list"
    data: list[AdapterCard]


@router.get("/v1/adapters")
async def list_adapters(engine: EngineDep) -> AdapterList:
    return AdapterList(data=[_card(engine, served) for served in engine.adapters.all()])


@router.get("/v1/adapters/{name}")
async def get_adapter(name: Name, engine: EngineDep) -> AdapterCard:
    return _card(engine, engine.adapters.get(name))


@router.put("/v1/adapters/{name}", responses={201: {"model": AdapterCard}})
async def put_adapter(
    name: Name, body: PutAdapterRequest, engine: EngineDep, response: Response
) -> AdapterCard:
    """Load an adapter, or replace the one of this name: 201 or 200.

    Another may be evicted from memory for it; `pinned` keeps this one from being evicted. Requests in flight
    finish on the weights they started with.
    """
    served, created = await engine.loader.run(
        engine.adapters.load_for_caller, name, body.source, body.base, pinned=body.pinned
    )
    response.status_code = 201 if created else 200
    response.headers[DIGEST_HEADER] = served.digest
    return _card(engine, served)


@router.delete("/v1/adapters/{name}", status_code=204)
async def delete_adapter(name: Name, engine: EngineDep) -> None:
    """Stop serving an adapter; requests in flight finish."""
    engine.adapters.remove(name)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraRequest, engine: EngineDep) -> str:
    """vLLM's verb: a name that is taken is replaced only with `load_inplace`."""
    if body.lora_name in engine.adapters and not body.load_inplace:
        message = f"the adapter {body.lora_name!r} is already loaded; set load_inplace to replace it"
        raise ServiceError(ErrorKind.ALREADY_LOADED, message, param="lora_name")
    await engine.loader.run(
        engine.adapters.load_for_caller, body.lora_name, body.lora_path, body.base_model_name
    )
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraRequest, engine: EngineDep) -> str:
    """vLLM's verb."""
    engine.adapters.remove(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _card(engine: Engine, served: ServedAdapter) -> AdapterCard:
    config = served.config
    return AdapterCard(
        name=served.name,
        base=served.base,
        kind=config.kind,
        task=config.task_type,
        digest=served.digest,
        rank=config.r,
        labels=dict(served.labels),
        mixed_depths=list(config.molex.mixed_depths) if config.molex else [],
        bytes=served.nbytes,
        resident=engine.adapters.is_resident(served),
        pinned=served.pinned,
        source=served.source,
        created=served.created,
    )
