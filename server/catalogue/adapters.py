"""Adapters in the catalogue: their versions, which of them is current, and their aliases.

Every change gives the whole adapter as it is afterwards.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, func, insert, select, update

from server.catalogue.catalogue import Catalogue
from server.catalogue.records import AdapterRecord, Facts, State, Version
from server.catalogue.tables import adapter_aliases as aliases
from server.catalogue.tables import adapter_versions as versions
from server.catalogue.tables import adapters, tenants
from server.catalogue.transactions import reads, writes
from server.errors import ErrorKind, ServiceError, adapter_not_found

Values = Mapping[str, Any]
RECORDS = (
    select(adapters.c.name, adapters.c.current, versions, aliases.c.alias)
    .select_from(adapters.outerjoin(versions))
    .outerjoin(aliases, (aliases.c.adapter == versions.c.adapter) & (aliases.c.number == versions.c.number))
    .order_by(adapters.c.name, versions.c.number)
)
"""A row for each version of each adapter, or for each of its aliases where it has any."""


class AdapterCatalogue:
    """The adapters of a catalogue. Raises ServiceError: 503 while the database cannot be reached."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.transactions = catalogue.transactions
        self._catalogue = catalogue

    @reads
    def all(self, connection: Connection) -> list[AdapterRecord]:
        """Every adapter, by name."""
        return _records(connection)

    @reads
    def find(self, connection: Connection, name: str) -> AdapterRecord | None:
        return _record(connection, name)

    @writes
    def register(
        self,
        connection: Connection,
        name: str,
        *,
        source: str,
        base: str | None,
        digest: str | None,
        pinned: bool,
        actor: str,
    ) -> AdapterRecord:
        """Add a version that is to be loaded, the newest one; those that failed before it are forgotten.

        Raises ServiceError where the tenant has no room for one more.
        """
        number = _next_number(connection, name)
        failed = versions.c.state == State.FAILED
        connection.execute(delete(versions).where(versions.c.adapter == name, failed))
        now = self._catalogue.now()
        row = {
            "adapter": name,
            "number": number,
            "source": source,
            "base": base,
            "digest": digest,
            "pinned": pinned,
            "state": State.REGISTERED,
            "actor": actor,
            "created": now,
            "updated": now,
        }
        connection.execute(insert(versions), row)
        detail = {"version": number, "source": source}
        self._append(connection, actor, "adapter.register", name, detail)
        return _known(connection, name)

    @writes
    def fail(self, connection: Connection, name: str, number: int, reason: str) -> AdapterRecord:
        """Say that a version could not be loaded; nothing, where another server has it ready by now."""
        record = _known(connection, name)
        version = next((v for v in record.versions if v.number == number and not v.ready), None)
        if version is not None:
            self._change(connection, name, number, {"state": State.FAILED, "reason": reason})
            detail = {"version": number}
            self._append(connection, version.actor, "adapter.fail", name, detail)
        return _known(connection, name)

    @writes
    def finish(
        self, connection: Connection, name: str, number: int, source: str, facts: Facts
    ) -> AdapterRecord:
        """Make a version that has passed all tests the current one.

        Where another version has the same files on the same base, that one becomes current, and this one is
        forgotten. Nothing changes where another server has made it ready before. Raises ServiceError where
        the tenant has no room for it.
        """
        record = _known(connection, name)
        version = next((v for v in record.versions if v.number == number), None)
        if version is None:
            raise adapter_not_found(name)
        if version.ready:
            return record
        others = (other for other in record.versions if other.ready and other.number != number)
        twin = next((other for other in others if other.facts == facts), None)
        if twin is None:
            _check_count(connection, _tenant(name), (State.READY,))
            _check_bytes(connection, _tenant(name), facts.size)
            self._change(connection, name, number, _columns(source, facts))
        else:
            connection.execute(delete(versions).where(_one(name, number)))
            self._change(connection, name, twin.number, {"pinned": version.pinned})
        current = number if twin is None else twin.number
        detail = {"version": current, "digest": facts.digest}
        self._set_current(connection, name, current, version.actor, "adapter.load", detail)
        return _known(connection, name)

    @writes
    def rollback(self, connection: Connection, name: str, number: int, *, actor: str) -> AdapterRecord:
        """Make a ready version the current one."""
        record = _known(connection, name)
        version = _ready(record, number)
        detail = {"version": number, "digest": version.digest, "from": record.current}
        self._set_current(connection, name, number, actor, "adapter.rollback", detail)
        return _known(connection, name)

    @writes
    def set_alias(
        self, connection: Connection, name: str, alias: str, number: int, *, actor: str
    ) -> AdapterRecord:
        """Let an alias name a ready version."""
        record = _known(connection, name)
        version = _ready(record, number)
        connection.execute(delete(aliases).where(_alias(name, alias)))
        connection.execute(insert(aliases).values(adapter=name, alias=alias, number=number))
        detail = {"alias": alias, "version": number, "digest": version.digest}
        self._append(connection, actor, "adapter.alias", name, detail)
        return _known(connection, name)

    @writes
    def remove_alias(self, connection: Connection, name: str, alias: str, *, actor: str) -> AdapterRecord:
        record = _known(connection, name)
        if alias not in record.aliases:
            raise adapter_not_found(f"{name}@{alias}")
        connection.execute(delete(aliases).where(_alias(name, alias)))
        self._append(connection, actor, "adapter.alias_remove", name, {"alias": alias})
        return _known(connection, name)

    @writes
    def remove_version(self, connection: Connection, name: str, number: int, *, actor: str) -> AdapterRecord:
        """Forget a version. Raises ServiceError (409) where it is current or an alias names it."""
        record = _known(connection, name)
        version = next((v for v in record.versions if v.number == number), None)
        if version is None:
            raise adapter_not_found(f"{name}@{number}")
        uses = [f"the alias {alias!r} names it" for alias, named in record.aliases.items() if named == number]
        if number == record.current:
            uses.insert(0, "it is the current one")
        elif len(record.versions) == 1:
            uses = ["it is the only one, which goes with the adapter"]
        if uses:
            message = f"version {number} of {name!r} is in use: {', '.join(uses)}"
            raise ServiceError(ErrorKind.VERSION_IN_USE, message, param="number")
        connection.execute(delete(versions).where(_one(name, number)))
        detail = {"version": number, "digest": version.digest}
        self._append(connection, actor, "adapter.remove", name, detail)
        return _known(connection, name)

    @writes
    def remove(self, connection: Connection, name: str, *, actor: str) -> None:
        """Forget an adapter with all its versions and aliases."""
        record = _known(connection, name)
        for table in (aliases, versions):
            connection.execute(delete(table).where(table.c.adapter == name))
        connection.execute(delete(adapters).where(adapters.c.name == name))
        digests = {str(version.number): version.digest for version in record.versions}
        self._append(connection, actor, "adapter.remove", name, {"versions": digests})

    def _change(self, connection: Connection, name: str, number: int, values: Values) -> None:
        changed = {**values, "updated": self._catalogue.now()}
        connection.execute(update(versions).where(_one(name, number)), changed)

    def _set_current(
        self, connection: Connection, name: str, number: int, actor: str, action: str, detail: Values
    ) -> None:
        connection.execute(update(adapters).where(adapters.c.name == name), {"current": number})
        self._append(connection, actor, action, name, detail)

    def _append(self, connection: Connection, actor: str, action: str, name: str, detail: Values) -> None:
        self._catalogue.append(connection, actor, action, f"adapter:{name}", detail)


def _tenant(name: str) -> str | None:
    return name.rpartition("/")[0] or None


def _records(connection: Connection, name: str | None = None) -> list[AdapterRecord]:
    """All adapters, or the one of a name."""
    query = RECORDS if name is None else RECORDS.where(adapters.c.name == name)
    current: dict[str, int | None] = {}
    kept: defaultdict[str, dict[int, Version]] = defaultdict(dict)
    named: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for row in connection.execute(query).mappings():
        owner, number = row["name"], row["number"]
        current[owner] = row["current"]
        if number is not None and number not in kept[owner]:
            kept[owner][number] = _version(row)
        if row["alias"] is not None:
            named[owner][row["alias"]] = number
    return [
        AdapterRecord(name, number, tuple(kept[name].values()), dict(sorted(named[name].items())))
        for name, number in current.items()
    ]


def _next_number(connection: Connection, name: str) -> int:
    """The number of an adapter's next version, which may be its first. Raises ServiceError (409)."""
    counted = update(adapters).where(adapters.c.name == name).values(last=adapters.c.last + 1)
    number: int | None = connection.scalar(counted.returning(adapters.c.last))
    if number is None:
        _check_count(connection, _tenant(name), tuple(State))
        number = 1
        row = {"name": name, "tenant": _tenant(name), "last": number}
        connection.execute(insert(adapters), row)
    return number


def _record(connection: Connection, name: str) -> AdapterRecord | None:
    return next(iter(_records(connection, name)), None)


def _known(connection: Connection, name: str) -> AdapterRecord:
    record = _record(connection, name)
    if record is None:
        raise adapter_not_found(name)
    return record


def _version(row: Mapping[Any, Any]) -> Version:
    facts = None
    if row["state"] == State.READY:
        labels = {int(label): text for label, text in json.loads(row["labels"]).items()}
        known = {field: row[field] for field in ("base", "digest", "size", "kind", "task", "config")}
        facts = Facts(labels=labels, **known)
    own = {
        field: row[field]
        for field in ("number", "source", "base", "digest", "pinned", "reason", "actor", "created", "updated")
    }
    return Version(state=State(row["state"]), facts=facts, **own)


def _columns(source: str, facts: Facts) -> dict[str, Any]:
    known = vars(facts) | {"labels": json.dumps(dict(facts.labels))}
    return {"source": source, "state": State.READY, "reason": None, **known}


def _ready(record: AdapterRecord, number: int) -> Version:
    version = record.find(number)
    if version is None:
        raise adapter_not_found(f"{record.name}@{number}")
    return version


def _one(name: str, number: int) -> ColumnElement[bool]:
    return (versions.c.adapter == name) & (versions.c.number == number)


def _alias(name: str, alias: str) -> ColumnElement[bool]:
    return (aliases.c.adapter == name) & (aliases.c.alias == alias)


def _check_count(connection: Connection, tenant: str | None, states: Sequence[State]) -> None:
    """Whether there is room for one more version beside those in these states."""
    if tenant is None:
        return
    limit = connection.execute(select(tenants.c.adapters).where(_named(tenant))).scalar_one()
    kept = connection.execute(_kept(tenant, func.count(), states)).scalar_one()
    if limit is not None and kept >= limit:
        message = f"{tenant} keeps {kept} versions of adapters, which is its limit: remove one"
        raise ServiceError(ErrorKind.ADAPTER_QUOTA, message)


def _check_bytes(connection: Connection, tenant: str | None, size: int) -> None:
    if tenant is None:
        return
    limit = connection.execute(select(tenants.c.adapter_bytes).where(_named(tenant))).scalar_one()
    total = func.coalesce(func.sum(versions.c.size), 0)
    size += int(connection.execute(_kept(tenant, total, (State.READY,))).scalar_one())
    if limit is not None and size > limit:
        message = f"the adapters of {tenant} would take {size} bytes; its limit is {limit}"
        raise ServiceError(ErrorKind.ADAPTER_QUOTA, message)


def _named(tenant: str) -> ColumnElement[bool]:
    return tenants.c.name == tenant


def _kept(tenant: str, what: ColumnElement[Any], states: Sequence[State]) -> Select[Any]:
    """A query over the versions of a tenant in some states."""
    kept = (adapters.c.tenant == tenant) & versions.c.state.in_(states)
    return select(what).select_from(versions.join(adapters)).where(kept)
