"""How an adapter is shown: what serves under its name, its versions and its aliases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from server.catalogue.records import State, Version
from server.errors import adapter_not_found
from server.registry.registry import Registry
from server.served import ServedAdapter


class VersionCard(BaseModel):
    """One version. What is null is not known before its files have been read."""

    version: int
    state: State
    reason: str | None
    digest: str | None
    base: str | None
    kind: str | None
    task: str | None
    labels: dict[int, str]
    bytes: int | None
    source: str
    pinned: bool
    created: int
    updated: int


class AdapterCard(BaseModel):
    """An adapter. `state` is that of its newest load, and `reason` why it failed.

    Of several servers with one catalogue, each says so of a version too that another one has loaded and that
    it cannot serve itself.

    `version` is the current one, which its name means and which serves; what follows it, down to `created`,
    is of that version, or null while there is none. Version 0 is a folder of the operator's, read in place.
    `source` is as its loader named it, `upload` for files that were sent. `bytes` is what its weights take in
    memory. `resident` says whether they are there now: if not, the next request brings them back. `pinned`
    ones stay there. Times are in seconds since the epoch.
    """

    name: str
    object: str = "adapter"
    state: State
    reason: str | None
    version: int | None
    base: str | None
    kind: str | None
    task: str | None
    digest: str | None
    rank: int | None
    labels: dict[int, str]
    mixed_depths: list[int]
    bytes: int | None
    resident: bool
    pinned: bool
    source: str | None
    created: int
    versions: list[VersionCard]
    aliases: dict[str, int]


class AdapterList(BaseModel):
    object: str = "list"
    data: list[AdapterCard]


def adapter_card(registry: Registry, full_name: str) -> AdapterCard:
    """Raises ServiceError (404) where the adapter has gone in the meantime."""
    record = registry.seen(full_name)
    served = registry.engine.adapters.find(full_name)
    newest = None if record is None else record.newest
    if newest is None and served is None:
        raise adapter_not_found(full_name)
    versions = [] if record is None else [_version(version) for version in record.versions]
    if served is not None and served.version == 0:
        versions.insert(0, _in_place(served))
    return AdapterCard(
        name=full_name,
        state=State.READY if newest is None else newest.state,
        reason=None if newest is None else newest.reason,
        created=versions[-1].created if served is None else served.created,
        resident=served is not None and registry.engine.adapters.is_resident(served),
        versions=versions,
        aliases={} if record is None else dict(record.aliases),
        **_current(served),
    )


def _current(served: ServedAdapter | None) -> dict[str, Any]:
    if served is None:
        unknown = ("version", "base", "kind", "task", "digest", "rank", "bytes", "source")
        return {**dict.fromkeys(unknown), "labels": {}, "mixed_depths": [], "pinned": False}
    molex = served.config.molex
    return {
        "version": served.version,
        "rank": served.config.r,
        "mixed_depths": list(molex.mixed_depths) if molex else [],
        **_known(served.base, served.digest, served.config.kind, served.config.task_type, served.labels),
        "bytes": served.nbytes,
        "source": served.source,
        "pinned": served.pinned,
    }


def _version(version: Version) -> VersionCard:
    own = {
        name: getattr(version, name) for name in ("state", "reason", "source", "pinned", "created", "updated")
    }
    facts = version.facts
    known = (
        _known(version.base, version.digest, None, None, {})
        if facts is None
        else _known(facts.base, facts.digest, facts.kind, facts.task, facts.labels)
    )
    return VersionCard(version=version.number, bytes=None if facts is None else facts.size, **known, **own)


def _in_place(served: ServedAdapter) -> VersionCard:
    return VersionCard(
        version=served.version,
        state=State.READY,
        reason=None,
        bytes=served.nbytes,
        source=served.source,
        pinned=served.pinned,
        created=served.created,
        updated=served.created,
        **_known(served.base, served.digest, served.config.kind, served.config.task_type, served.labels),
    )


def _known(
    base: str | None, digest: str | None, kind: str | None, task: str | None, labels: Mapping[int, str]
) -> dict[str, Any]:
    return {"base": base, "digest": digest, "kind": kind, "task": task, "labels": dict(labels)}
