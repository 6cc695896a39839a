"""Reading and changing the catalogue. Every change and its audit entry are one transaction."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sqlalchemy import URL, Connection, Row, insert, select, update

from server.catalogue import audit, tokens
from server.catalogue.records import ApiKey, AuditEntry, Quota, Scope, Tenant
from server.catalogue.tables import api_keys, audit_entries, audit_head, tenants
from server.catalogue.transactions import Transactions, reads, writes
from server.errors import ErrorKind, ServiceError

LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Names of tenants and keys: safe in a path, and the same on file systems that ignore case."""
MAX_LIVE = 2
"""Live keys of one name: the one in use and the one that replaces it."""


class Catalogue:
    """Tenants, API keys and the audit log. Raises ServiceError: 503 while the database cannot be reached."""

    def __init__(self, url: URL, pepper: str, clock: Callable[[], float] = time.time) -> None:
        self.transactions = Transactions(url)
        self._pepper = pepper
        self._clock = clock

    async def close(self) -> None:
        """Wait for the transactions under way."""
        await asyncio.to_thread(self.transactions.close)

    def now(self) -> int:
        """Seconds since the epoch."""
        return int(self._clock())

    def is_secret(self, token: str, key: ApiKey) -> bool:
        """Whether a token is that of a key."""
        return tokens.matches(token, self._pepper, key.digest)

    @writes
    def set_tenant(
        self, connection: Connection, name: str, quota: Mapping[str, int | None], *, actor: str
    ) -> Tenant:
        """Create a tenant, or change the limits that are given."""
        _check_label(name, "tenant")
        known = _tenant(connection, name)
        if known is None:
            row = {"name": name, "created": self.now(), **quota}
            connection.execute(insert(tenants).values(row))
        elif quota:
            connection.execute(update(tenants).where(tenants.c.name == name).values(quota))
        action = "tenant.create" if known is None else "tenant.change"
        self.append(connection, actor, action, f"tenant:{name}", quota)
        tenant = _tenant(connection, name)
        assert tenant is not None
        return tenant

    @reads
    def tenants(self, connection: Connection) -> list[Tenant]:
        """Every tenant, by name."""
        return [_to_tenant(row) for row in connection.execute(select(tenants).order_by("name"))]

    @writes
    def create_key(
        self,
        connection: Connection,
        tenant: str,
        scopes: frozenset[Scope],
        *,
        actor: str,
        name: str = "default",
        expires: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; returns it and its token, which is known only now.

        Refused where two keys of this tenant and name are live: one is to be revoked first.
        """
        _check_label(tenant, "tenant")
        _check_label(name, "name")
        now = self.now()
        if not scopes:
            _refuse(ErrorKind.INVALID_REQUEST, "a key needs at least one scope", "scopes")
        if expires is not None and expires <= now:
            _refuse(ErrorKind.INVALID_REQUEST, "the key would have expired already", "expires")
        key_id, token = tokens.new_token()
        key = ApiKey(key_id, tenant, name, tokens.digest(token, self._pepper), scopes, now, expires, None)
        if _tenant(connection, tenant) is None:
            message = f"no tenant is named {tenant!r}: create it first"
            _refuse(ErrorKind.TENANT_NOT_FOUND, message, "tenant")
        named = (api_keys.c.tenant == tenant) & (api_keys.c.name == name)
        others = [_to_key(row) for row in connection.execute(select(api_keys).where(named))]
        live = [other.id for other in others if other.state(now) == "live"]
        if len(live) >= MAX_LIVE:
            message = f"{tenant} has {len(live)} live keys named {name!r} ({', '.join(live)}): revoke one"
            _refuse(ErrorKind.TOO_MANY_KEYS, message, "name")
        spelled = vars(key) | {"scopes": " ".join(sorted(scopes))}
        connection.execute(insert(api_keys).values(spelled))
        detail = {"tenant": tenant, "name": name, "scopes": sorted(scopes), "expires": expires}
        self.append(connection, actor, "key.create", f"key:{key_id}", detail)
        return key, token

    @reads
    def keys(self, connection: Connection, tenant: str | None = None) -> list[ApiKey]:
        """Every key, or those of one tenant, the newest last."""
        query = select(api_keys).order_by(api_keys.c.created, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        return [_to_key(row) for row in connection.execute(query)]

    @writes
    def revoke(self, connection: Connection, key_id: str, *, actor: str) -> ApiKey:
        """End a key for good. Revoking it again changes nothing."""
        found = _key(connection, key_id) if tokens.is_key_id(key_id) else None
        if found is None:
            _refuse(ErrorKind.KEY_NOT_FOUND, f"no key has the id {key_id!r}", "key")
        if found.revoked is None:
            row = update(api_keys).where(api_keys.c.id == key_id).values(revoked=self.now())
            connection.execute(row)
            detail = {"tenant": found.tenant, "name": found.name}
            self.append(connection, actor, "key.revoke", f"key:{key_id}", detail)
            found = _key(connection, key_id)
        assert found is not None
        return found

    @reads
    def find_key(self, connection: Connection, key_id: str) -> tuple[ApiKey, Tenant] | None:
        """A key and its tenant."""
        key = _key(connection, key_id)
        tenant = _tenant(connection, key.tenant) if key else None
        return (key, tenant) if key and tenant else None

    @writes
    def record(
        self, connection: Connection, actor: str, action: str, subject: str, detail: Mapping[str, Any]
    ) -> None:
        """Add an audit entry for what happened elsewhere."""
        self.append(connection, actor, action, subject, detail)

    @reads
    def last_entry(self, connection: Connection) -> int:
        """The number of the newest audit entry; 0 where there is none."""
        number: int = connection.execute(select(audit_head.c.number)).scalar_one()
        return number

    @reads
    def entries(self, connection: Connection, after: int = 0, limit: int | None = None) -> list[AuditEntry]:
        """Audit entries after the one of a number, oldest first."""
        query = select(audit_entries).where(audit_entries.c.number > after).order_by("number").limit(limit)
        return list(audit.entries_of(connection.execute(query)))

    @writes
    def verify(self, connection: Connection) -> tuple[int, str, str | None]:
        """Number and hash of the newest audit entry, and what is wrong with the log, if anything is."""
        number, newest = connection.execute(select(audit_head.c.number, audit_head.c.hash)).one()
        rows = connection.execute(select(audit_entries).order_by("number"))
        return number, newest, audit.first_broken(audit.entries_of(rows), (number, newest))

    def append(
        self, connection: Connection, actor: str, action: str, subject: str, detail: Mapping[str, Any]
    ) -> None:
        """Add an audit entry to the transaction of a change."""
        now = self.now()
        audit.append(connection, time=now, actor=actor, action=action, subject=subject, detail=detail)


def _tenant(connection: Connection, name: str) -> Tenant | None:
    row = connection.execute(select(tenants).where(tenants.c.name == name)).one_or_none()
    return None if row is None else _to_tenant(row)


def _key(connection: Connection, key_id: str) -> ApiKey | None:
    row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    return None if row is None else _to_key(row)


def _to_tenant(row: Row[Any]) -> Tenant:
    values = dict(row._mapping)
    return Tenant(values.pop("name"), values.pop("created"), Quota(**values))


def _to_key(row: Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    return ApiKey(**values | {"scopes": frozenset(map(Scope, values["scopes"].split()))})


def _check_label(name: str, param: str) -> None:
    if not LABEL.fullmatch(name):
        message = f"{name!r} is no name: use lower case letters, digits, '.', '_' and '-', at most 63"
        _refuse(ErrorKind.INVALID_REQUEST, message, param)


def _refuse(kind: ErrorKind, message: str, param: str) -> NoReturn:
    raise ServiceError(kind, message, param=param)
