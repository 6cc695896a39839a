"""Tenants and API keys over HTTP, for keys with the scope `admin`. A change counts at once."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel

from server.catalogue.records import ApiKey, Quota, Scope, Tenant
from server.deps import AccessDep
from server.routes.access import Administer
from server.schemas import CreateKeyRequest, PutTenantRequest

router = APIRouter(tags=["administration"])
Name = Annotated[str, Path(max_length=64)]


class TenantCard(BaseModel):
    """A tenant and its limits; null is no limit."""

    name: str
    object: str = "tenant"
    created: int
    quota: Quota


class TenantList(BaseModel):
    object: str = "list"
    data: list[TenantCard]


class KeyCard(BaseModel):
    """A key without its secret. Times are in seconds since the epoch."""

    id: str
    object: str = "api_key"
    tenant: str
    name: str
    scopes: list[Scope]
    created: int
    expires: int | None
    revoked: int | None


class NewKey(KeyCard):
    """A key that was just made. `token` is shown this once."""

    token: str


class KeyList(BaseModel):
    object: str = "list"
    data: list[KeyCard]


@router.get("/v1/tenants")
async def list_tenants(access: AccessDep, _: Administer) -> TenantList:
    return TenantList(data=[_tenant(tenant) for tenant in await access.catalogue.tenants()])


@router.put("/v1/tenants/{name}")
async def put_tenant(name: Name, body: PutTenantRequest, access: AccessDep, caller: Administer) -> TenantCard:
    """Create a tenant, or change the limits that the body names."""
    quota = body.model_dump(exclude_unset=True)
    tenant = await access.catalogue.set_tenant(name, quota, actor=str(caller.key_id))
    access.changed(f"tenant:{name}")
    return _tenant(tenant)


@router.get("/v1/keys")
async def list_keys(access: AccessDep, _: Administer) -> KeyList:
    return KeyList(data=[KeyCard(**_key(key)) for key in await access.catalogue.keys()])


@router.post("/v1/keys", status_code=201)
async def create_key(body: CreateKeyRequest, access: AccessDep, caller: Administer) -> NewKey:
    """Make a key for a tenant. Two of a name may live, for rotation."""
    key, token = await access.catalogue.create_key(
        body.tenant,
        frozenset(body.scopes),
        actor=str(caller.key_id),
        name=body.name,
        expires=body.expires,
    )
    return NewKey(**_key(key), token=token)


@router.delete("/v1/keys/{key_id}")
async def revoke_key(key_id: Name, access: AccessDep, caller: Administer) -> KeyCard:
    """End a key. This server refuses it from now on, others within a second."""
    key = await access.catalogue.revoke(key_id, actor=str(caller.key_id))
    access.changed(f"key:{key_id}")
    return KeyCard(**_key(key))


def _tenant(tenant: Tenant) -> TenantCard:
    return TenantCard(name=tenant.name, created=tenant.created, quota=tenant.quota)


def _key(key: ApiKey) -> dict[str, Any]:
    values = vars(key) | {"scopes": sorted(key.scopes)}
    del values["digest"]
    return values
