"""Adapters as a resource: their versions, which of them serves, and their aliases; and vLLM's verbs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse

from server.auth.caller import Caller
from server.catalogue.records import Scope
from server.deps import DIGEST_HEADER, EngineDep, LoadsDep, RegistryDep
from server.errors import ErrorKind, ServiceError
from server.registry.loads import Load, Loads
from server.routes.access import ReadAdapters, WriteAdapters
from server.routes.adapter_cards import AdapterCard, AdapterList, adapter_card
from server.routes.errors import text_answers
from server.routes.uploads import DOCUMENTED, Upload, read_put
from server.routes.vllm_errors import VLLM_ERRORS
from server.schemas import (
    AdapterName,
    AliasName,
    AliasRequest,
    LoadLoraRequest,
    RollbackRequest,
    UnloadLoraRequest,
)

MAX_WAIT = 300
"""Seconds."""

router = APIRouter(tags=["adapters"])
vllm_verbs = APIRouter(tags=["vllm"], **VLLM_ERRORS)
Name = Annotated[AdapterName, Path()]
Alias = Annotated[AliasName, Path()]
Number = Annotated[int, Path(ge=1, le=2**53)]
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT, allow_inf_nan=False)]


@router.get("/v1/adapters")
async def list_adapters(registry: RegistryDep, caller: ReadAdapters) -> AdapterList:
    """The caller's own adapters and those that the operator shares, whatever their state."""
    return AdapterList(data=[adapter_card(registry, name) for name in registry.names(caller)])


# A name may have a slash: what comes after it is to be tried before the name alone.
@router.post("/v1/adapters/{name:path}/rollback")
async def rollback(
    name: Name, registry: RegistryDep, caller: WriteAdapters, body: RollbackRequest | None = None
) -> AdapterCard:
    """Make the version before the current one, or the one that is named, the current one.

    It is in memory before it is current; requests in flight finish on the weights they started with.
    """
    reference = None if body is None else body.version
    return adapter_card(registry, await registry.rollback(caller, name, reference))


@router.put("/v1/adapters/{name:path}/aliases/{alias}")
async def put_alias(
    name: Name, alias: Alias, body: AliasRequest, registry: RegistryDep, caller: WriteAdapters
) -> AdapterCard:
    """Let an alias name a version from now on: requests say `NAME@ALIAS`."""
    return adapter_card(registry, await registry.set_alias(caller, name, alias, body.version))


@router.delete("/v1/adapters/{name:path}/aliases/{alias}", status_code=204)
async def delete_alias(name: Name, alias: Alias, registry: RegistryDep, caller: WriteAdapters) -> None:
    """Forget an alias, not the version that it names."""
    await registry.remove_alias(caller, name, alias)


@router.delete("/v1/adapters/{name:path}/versions/{number}", status_code=204)
async def delete_version(name: Name, number: Number, loads: LoadsDep, caller: WriteAdapters) -> None:
    """Forget a version that is neither current nor named by an alias; requests in flight finish."""
    await loads.remove_version(caller, name, number)


@router.get("/v1/adapters/{name:path}")
async def get_adapter(name: Name, registry: RegistryDep, caller: ReadAdapters) -> AdapterCard:
    """An adapter with its versions and aliases, and how its newest load goes."""
    return adapter_card(registry, registry.find(caller, name))


@router.put(
    "/v1/adapters/{name:path}",
    openapi_extra=DOCUMENTED,
    status_code=202,
    responses={200: {"model": AdapterCard}, 201: {"model": AdapterCard}},
)
async def put_adapter(
    name: Name,
    request: Request,
    response: Response,
    engine: EngineDep,
    registry: RegistryDep,
    loads: LoadsDep,
    caller: WriteAdapters,
    wait: Wait = 0,
) -> AdapterCard:
    """Load a version of an adapter, which becomes the current one once a short text has run through it.

    202: it is not done yet; `state` in the answer, and in that of a later GET, says how far it has come.
    With `wait`, at most so many seconds, the answer may be 201 where the name is new, 200 where it is not, or
    the error of a load that failed, which leaves what was served before. Files that are there already make no
    new version. Another adapter may be evicted from memory for it; `pinned` keeps this one there.
    """
    body = await read_put(request, engine.settings.max_adapter_bytes)
    load = await (
        _upload(loads, caller, name, body)
        if isinstance(body, Upload)
        else load_source(loads, caller, name, body.source, body.base, pinned=body.pinned)
    )
    response.status_code = (201 if load.new else 200) if await load.wait(wait) else 202
    card = adapter_card(registry, load.request.name)
    if response.status_code == 202:
        response.headers["location"] = f"/v1/adapters/{card.name}"
    elif card.digest is not None:
        response.headers[DIGEST_HEADER] = card.digest
    return card


@router.delete("/v1/adapters/{name:path}", status_code=204)
async def delete_adapter(name: Name, loads: LoadsDep, caller: WriteAdapters) -> None:
    """Stop serving an adapter and forget all its versions; requests in flight finish."""
    await loads.remove(caller, name)


@vllm_verbs.post("/v1/load_lora_adapter", response_class=Response, responses=text_answers(200))
async def load_lora_adapter(
    body: LoadLoraRequest, engine: EngineDep, loads: LoadsDep, caller: WriteAdapters
) -> Response:
    """vLLM's verb: a name that is taken is replaced only with `load_inplace`."""
    if caller.own_name(body.lora_name) in engine.adapters and not body.load_inplace:
        # In vLLM's own words, which its clients look for.
        message = (
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        )
        raise ServiceError(ErrorKind.ALREADY_LOADED, message, param="lora_name")
    load = await load_source(loads, caller, body.lora_name, body.lora_path, body.base_model_name)
    await load.wait(None)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@vllm_verbs.post("/v1/unload_lora_adapter", response_class=Response, responses=text_answers(200))
async def unload_lora_adapter(body: UnloadLoraRequest, loads: LoadsDep, caller: WriteAdapters) -> Response:
    """vLLM's verb."""
    await loads.remove(caller, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def load_source(
    loads: Loads, caller: Caller, name: str, source: str, base: str | None, *, pinned: bool = False
) -> Load:
    """Begin to load an adapter of the caller's own from a source. Raises ServiceError."""
    _check_pinned(caller, pinned=pinned)
    return await loads.from_source(caller, name, source, base, pinned=pinned)


async def _upload(loads: Loads, caller: Caller, name: str, upload: Upload) -> Load:
    pinned = upload.fields.pinned == "true"
    _check_pinned(caller, pinned=pinned)
    return await loads.from_files(caller, name, upload.files, upload.fields.base, pinned=pinned)


def _check_pinned(caller: Caller, *, pinned: bool) -> None:
    if pinned and Scope.ADMIN not in caller.scopes:
        message = "pinned takes memory from every tenant: it needs the scope admin"
        raise ServiceError(ErrorKind.MISSING_SCOPE, message, param="pinned")
