"""What the catalogue holds, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Scope(StrEnum):
    """What an API key may be used for."""

    INFER = "infer"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    METRICS = "metrics"
    ADMIN = "admin"


@dataclass(frozen=True)
class Quota:
    """The limits of a tenant; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    """Requests under way at a time."""
    adapters: int | None = None
    adapter_bytes: int | None = None
    """What the weights of all its adapters may take in memory."""


@dataclass(frozen=True)
class Tenant:
    name: str
    created: int
    """Seconds since the epoch, as every time here."""
    quota: Quota = field(default_factory=Quota)


@dataclass(frozen=True)
class ApiKey:
    """A key without its secret, of which only the digest is known."""

    id: str
    tenant: str
    name: str
    digest: str
    scopes: frozenset[Scope]
    created: int
    expires: int | None
    revoked: int | None

    def state(self, now: float) -> str:
        """`live`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "live"


@dataclass(frozen=True)
class AuditEntry:
    """One line of the audit log. `hash` covers all of it and the hash of the entry before."""

    number: int
    time: int
    actor: str
    """The id of the key that acted, or the name of the program."""
    action: str
    subject: str
    """`tenant:NAME`, `key:ID` or `adapter:NAME`."""
    detail: str
    """A JSON object."""
    hash: str
