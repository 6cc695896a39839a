"""What the catalogue holds, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    """Versions of adapters that are kept."""
    adapter_bytes: int | None = None
    """What the weights of all versions of its adapters may take in memory."""


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


class State(StrEnum):
    """How far a version has come."""

    REGISTERED = "registered"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class Facts:
    """What is known of a version once its files have been read."""

    base: str
    digest: str
    size: int
    """Bytes that its weights take in memory."""
    kind: str
    task: str
    labels: Mapping[int, str]
    config: str
    """Its adapter_config.json."""


@dataclass(frozen=True)
class Version:
    """One version of an adapter."""

    number: int
    source: str
    """Where its files came from: a URI, a folder as its loader named it, or `upload`."""
    base: str | None
    """As its loader named it, if at all, until there are facts."""
    digest: str | None
    """Known from the start of what was uploaded."""
    pinned: bool
    state: State
    reason: str | None
    facts: Facts | None
    actor: str
    created: int
    updated: int

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    @property
    def under_way(self) -> bool:
        return self.state in (State.REGISTERED, State.LOADING)


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter as a resource: its versions, oldest first, the one that its name means, and its aliases."""

    name: str
    """`TENANT/NAME`, or `NAME` alone where there are no tenants."""
    current: int | None
    versions: tuple[Version, ...]
    aliases: Mapping[str, int]

    @property
    def newest(self) -> Version | None:
        return self.versions[-1] if self.versions else None

    def find(self, reference: int | str) -> Version | None:
        """The ready version of a number or an alias."""
        number = self.aliases.get(reference) if isinstance(reference, str) else reference
        return next((v for v in self.versions if v.number == number and v.ready), None)

    def having(self, version: Version) -> AdapterRecord:
        """The same with another state of one of its versions."""
        return replace(
            self, versions=tuple(version if v.number == version.number else v for v in self.versions)
        )

    @property
    def previous(self) -> Version | None:
        """The ready version before the current one."""
        earlier = [v for v in self.versions if v.ready and v.number < (self.current or 0)]
        return earlier[-1] if earlier else None
