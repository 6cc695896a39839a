"""Which files of adapters are kept on the disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from server.catalogue.records import AdapterRecord, State, Version
from server.registry.remote import is_remote


def needed(records: Iterable[AdapterRecord]) -> set[str]:
    """Digests of the files that a version has, or is about to have."""
    return {version.digest for version in _kept(records) if version.digest}


def fetchable(records: Iterable[AdapterRecord], held: Collection[str]) -> set[str]:
    """Digests of the files that can be fetched again, but for those that are held."""
    remote: set[str] = set()
    local = set(held)
    for version in _kept(records):
        if version.digest:
            (remote if version.ready and is_remote(version.source) else local).add(version.digest)
    return remote - local


def _kept(records: Iterable[AdapterRecord]) -> Iterator[Version]:
    return (v for record in records for v in record.versions if v.state != State.FAILED)
