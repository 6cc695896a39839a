"""The audit log: who changed what. Each entry carries a hash of itself and of all before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Row, insert, update

from server.catalogue.records import AuditEntry
from server.catalogue.tables import audit_entries, audit_head

FIRST_HASH = "0" * 64
"""What stands for the hash of the entry before the first."""
HEAD = "audit_head"
"""Where a connection keeps the number and the hash of the newest entry."""


def entry_hash(entry: AuditEntry, previous: str) -> str:
    """SHA-256, in hex, of the hash before and of every field of an entry."""
    fields = [previous, entry.number, entry.time, entry.actor, entry.action, entry.subject, entry.detail]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def lock(connection: Connection) -> None:
    """Make this transaction the only one that writes. It has to be its first statement.

    The newest entry cannot change from now on, so that the connection keeps what `append` needs of it.
    """
    locked = update(audit_head).values(id=1).returning(audit_head.c.number, audit_head.c.hash)
    connection.info[HEAD] = connection.execute(locked).one()


def append(
    connection: Connection,
    *,
    time: int,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any],
) -> AuditEntry:
    """Add an entry within a transaction that holds the lock."""
    newest, previous = connection.info[HEAD]
    text = json.dumps(detail, sort_keys=True)
    entry = AuditEntry(newest + 1, time, actor, action, subject, text, "")
    hashed = entry_hash(entry, previous)
    connection.execute(insert(audit_entries), vars(entry) | {"hash": hashed})
    connection.execute(update(audit_head), {"number": entry.number, "hash": hashed})
    connection.info[HEAD] = entry.number, hashed
    return AuditEntry(**vars(entry) | {"hash": hashed})


def first_broken(entries: Iterable[AuditEntry], head: tuple[int, str]) -> str | None:
    """What is wrong with a whole log, in words; None where every entry follows from the one before.

    `head`: number and hash of the newest entry, as the database keeps them beside the log.
    """
    number, previous = 0, FIRST_HASH
    for entry in entries:
        number += 1
        if entry.number != number:
            return f"entry {number} is missing"
        if entry.hash != entry_hash(entry, previous):
            return f"entry {number} was changed, or one before it"
        previous = entry.hash
    if (number, previous) != head:
        return f"the log ends at entry {number}, and its newest was {head[0]}"
    return None


def entries_of(rows: Iterable[Row[Any]]) -> Iterator[AuditEntry]:
    return (AuditEntry(**row._mapping) for row in rows)
