"""Loading, listing and removing adapters, in our verbs and in vLLM's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from server.adapters import ServedAdapter
from server.auth.access import Access
from server.auth.caller import Caller
from server.catalogue.records import Scope
from server.deps import DIGEST_HEADER, AccessDep, EngineDep, find_adapter, visible
from server.engine import Engine
from server.errors import ErrorKind, ServiceError, adapter_not_found
from server.routes.access import ReadAdapters, WriteAdapters
from server.routes.errors import text_answers
from server.routes.vllm_errors import VLLM_ERRORS
from server.schemas import AdapterName, LoadLoraRequest, PutAdapterRequest, UnloadLoraRequest

router = APIRouter(tags=["adapters"])
vllm_verbs = APIRouter(tags=["vllm"], **VLLM_ERRORS)
Name = Annotated[AdapterName, Path()]


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
async def list_adapters(engine: EngineDep, caller: ReadAdapters) -> AdapterList:
    return AdapterList(data=[_card(engine, served) for served in visible(engine, caller)])


@router.get("/v1/adapters/{name:path}")
async def get_adapter(name: Name, engine: EngineDep, caller: ReadAdapters) -> AdapterCard:
    served = find_adapter(engine, caller, name)
    if served is None:
        raise adapter_not_found(name)
    return _card(engine, served)


@router.put("/v1/adapters/{name:path}", responses={201: {"model": AdapterCard}})
async def put_adapter(
    name: Name,
    body: PutAdapterRequest,
    engine: EngineDep,
    access: AccessDep,
    caller: WriteAdapters,
    response: Response,
) -> AdapterCard:
    """Load an adapter, or replace the one of this name: 201 or 200.

    Another may be evicted from memory for it; `pinned` keeps this one from being evicted. Requests in flight
    finish on the weights they started with.
    """
    served, created = await load_adapter(
        engine, access, caller, name, body.source, body.base, pinned=body.pinned
    )
    response.status_code = 201 if created else 200
    response.headers[DIGEST_HEADER] = served.digest
    return _card(engine, served)


@router.delete("/v1/adapters/{name:path}", status_code=204)
async def delete_adapter(name: Name, engine: EngineDep, access: AccessDep, caller: WriteAdapters) -> None:
    """Stop serving an adapter; requests in flight finish."""
    await remove_adapter(engine, access, caller, name)


@vllm_verbs.post("/v1/load_lora_adapter", response_class=Response, responses=text_answers(200))
async def load_lora_adapter(
    body: LoadLoraRequest, engine: EngineDep, access: AccessDep, caller: WriteAdapters
) -> Response:
    """vLLM's verb: a name that is taken is replaced only with `load_inplace`."""
    if caller.own_name(body.lora_name) in engine.adapters and not body.load_inplace:
        # In vLLM's own words, which its clients look for.
        message = (
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        )
        raise ServiceError(ErrorKind.ALREADY_LOADED, message, param="lora_name")
    await load_adapter(engine, access, caller, body.lora_name, body.lora_path, body.base_model_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@vllm_verbs.post("/v1/unload_lora_adapter", response_class=Response, responses=text_answers(200))
async def unload_lora_adapter(
    body: UnloadLoraRequest, engine: EngineDep, access: AccessDep, caller: WriteAdapters
) -> Response:
    """vLLM's verb."""
    await remove_adapter(engine, access, caller, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def load_adapter(
    engine: Engine,
    access: Access,
    caller: Caller,
    name: str,
    source: str,
    base: str | None,
    *,
    pinned: bool = False,
) -> tuple[ServedAdapter, bool]:
    """Load an adapter of the caller's own; returns it, and whether its name is new."""
    if pinned and Scope.ADMIN not in caller.scopes:
        message = "pinned takes memory from every tenant: it needs the scope admin"
        raise ServiceError(ErrorKind.MISSING_SCOPE, message, param="pinned")
    full_name = caller.own_name(name)
    served, created = await engine.loader.run(
        engine.adapters.load_for_caller, full_name, source, base, caller.quota, pinned=pinned
    )
    await access.record(caller, "adapter.load", f"adapter:{full_name}", digest=served.digest)
    return served, created


async def remove_adapter(engine: Engine, access: Access, caller: Caller, name: str) -> None:
    """Stop serving an adapter of the caller's own."""
    full_name = caller.own_name(name)
    if full_name not in engine.adapters and name in engine.adapters:
        message = f"{name!r} is shared by the operator, who alone removes it"
        raise ServiceError(ErrorKind.FORBIDDEN_ADAPTER, message, param="name")
    served = engine.adapters.remove(full_name)
    await access.record(caller, "adapter.remove", f"adapter:{full_name}", digest=served.digest)


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
