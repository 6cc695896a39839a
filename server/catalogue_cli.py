"""`molex tenant`, `molex key` and `molex audit`: the catalogue from the command line."""

from __future__ import annotations

import asyncio
import getpass
import json
import re
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from server.catalogue.catalogue import Catalogue
from server.catalogue.database import migrate
from server.catalogue.records import ApiKey, Scope, Tenant
from server.errors import ServiceError
from server.settings import CatalogueSettings, problems

T = TypeVar("T")
NO_LIMIT = "none"
SECONDS = {"h": 3600, "d": 86_400}

tenant_app = typer.Typer(help="Tenants and their limits.", no_args_is_help=True)
key_app = typer.Typer(help="API keys.", no_args_is_help=True)
audit_app = typer.Typer(help="The audit log.", no_args_is_help=True)

Database = Annotated[
    str | None, typer.Option("--database", help="URL of the catalogue. Default: MOLEX_DATABASE.")
]
TenantName = Annotated[str, typer.Option("--tenant", help="Whose key it is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Limit = Annotated[str | None, typer.Option(help=f"A number, or {NO_LIMIT} for no limit.")]


@tenant_app.command("set")
def set_tenant(
    name: Annotated[str, typer.Argument(help="Name of the tenant.")],
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrency: Limit = None,
    adapters: Limit = None,
    adapter_bytes: Limit = None,
    database: Database = None,
) -> None:
    """Create a tenant, or change the limits that are given."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
        "adapters": adapters,
        "adapter_bytes": adapter_bytes,
    }
    quota = {option: _limit(option, value) for option, value in given.items() if value is not None}
    tenant = _run(database, lambda catalogue: catalogue.set_tenant(name, quota, actor=_actor()))
    typer.echo(_tenant_line(tenant))


@tenant_app.command("list")
def list_tenants(as_json: AsJson = False, database: Database = None) -> None:
    """All tenants with their limits."""
    tenants = _run(database, lambda catalogue: catalogue.tenants())
    _print(map(_tenant_json if as_json else _tenant_line, tenants))


@key_app.command("create")
def create_key(
    tenant: TenantName,
    scopes: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(Scope)}.")] = Scope.INFER,
    name: Annotated[
        str, typer.Option(help="What the key is for. Two keys of a name may live, for rotation.")
    ] = "default",
    expires: Annotated[
        str | None, typer.Option(help="A time from now (12h, 90d) or a date in UTC (2027-01-31).")
    ] = None,
    database: Database = None,
) -> None:
    """Make a key and print it. This is the only time that it is shown."""
    chosen, until = _scopes(scopes), None if expires is None else _expiry(expires)
    key, token = _run(
        database,
        lambda catalogue: catalogue.create_key(tenant, chosen, actor=_actor(), name=name, expires=until),
    )
    typer.echo(f"{_key_line(key)}\nKeep it: it is not stored and not shown again.", err=True)
    typer.echo(token)


@key_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.")] = None,
    as_json: AsJson = False,
    database: Database = None,
) -> None:
    """All keys, without their secrets."""
    keys = _run(database, lambda catalogue: catalogue.keys(tenant))
    _print(map(_key_json if as_json else _key_line, keys))


@key_app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="Id of the key: the part between `molex_` and the next `_`.")],
    database: Database = None,
) -> None:
    """End a key. Running servers refuse it within a second."""
    revoked = _run(database, lambda catalogue: catalogue.revoke(key, actor=_actor()))
    typer.echo(_key_line(revoked))


@audit_app.command("list")
def list_entries(
    after: Annotated[int, typer.Option(min=0, help="Only entries after this number.")] = 0,
    database: Database = None,
) -> None:
    """The audit log as JSON, one entry a line."""
    entries = _run(database, lambda catalogue: catalogue.entries(after))
    _print(json.dumps(asdict(entry) | {"detail": json.loads(entry.detail)}) for entry in entries)


@audit_app.command("verify")
def verify_log(
    head: Annotated[
        str | None,
        typer.Option(help="NUMBER:HASH that an earlier run has printed; it has to be part of the log."),
    ] = None,
    database: Database = None,
) -> None:
    """Check that no audit entry was changed or removed, and print the newest as NUMBER:HASH.

    Who can write to the database can write a whole new log: keep what is printed elsewhere.
    """
    number, newest, problem = _run(database, lambda catalogue: catalogue.verify())
    if problem is None and head is not None and not _contains(database, head):
        problem = f"the log does not contain the entry {head}"
    if problem is not None:
        typer.echo(f"error: {problem}", err=True)
        sys.exit(1)
    typer.echo(f"{number}:{newest}")


def _contains(database: str | None, head: str) -> bool:
    number, _, expected = head.partition(":")
    if not number.isdecimal() or int(number) == 0:
        raise typer.BadParameter(f"{head!r} is not NUMBER:HASH", param_hint="--head")
    entries = _run(database, lambda catalogue: catalogue.entries(int(number) - 1, 1))
    return [entry.hash for entry in entries] == [expected]


def _run(database: str | None, work: Callable[[Catalogue], Coroutine[Any, Any, T]]) -> T:
    """Do something with the catalogue; what goes wrong ends the program in one line."""
    try:
        given: dict[str, Any] = {} if database is None else {"database": database}
        settings = CatalogueSettings(**given)
        if settings.catalogue is None:
            raise typer.BadParameter("name a catalogue, here or in MOLEX_DATABASE", param_hint="--database")
        url, pepper = settings.catalogue
        migrate(url)
        return asyncio.run(_with(Catalogue(url, pepper), work))
    except ValidationError as error:
        typer.echo("\n".join(problems(error)), err=True)
        sys.exit(2)
    except ServiceError as error:
        typer.echo(f"error: {error.message}", err=True)
        sys.exit(1)


async def _with(catalogue: Catalogue, work: Callable[[Catalogue], Coroutine[Any, Any, T]]) -> T:
    try:
        return await work(catalogue)
    finally:
        await catalogue.close()


def _actor() -> str:
    return f"cli:{getpass.getuser()}"


def _limit(option: str, value: str) -> int | None:
    if value == NO_LIMIT:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", value):
        hint = "--" + option.replace("_", "-")
        raise typer.BadParameter(f"{value!r} is neither a number nor {NO_LIMIT}", param_hint=hint)
    return int(value)


def _scopes(text: str) -> frozenset[Scope]:
    try:
        return frozenset(Scope(part.strip()) for part in text.split(","))
    except ValueError as error:
        message = f"{error}; there are {', '.join(Scope)}"
        raise typer.BadParameter(message, param_hint="--scopes") from None


def _expiry(text: str) -> int:
    """Seconds since the epoch."""
    if found := re.fullmatch(r"([0-9]{1,6})([hd])", text):
        return int(time.time()) + int(found[1]) * SECONDS[found[2]]
    try:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
    except ValueError:
        message = f"{text!r} is neither a time from now (12h, 90d) nor a date (2027-01-31)"
        raise typer.BadParameter(message, param_hint="--expires") from None


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def _tenant_line(tenant: Tenant) -> str:
    limits = [f"{name}={value}" for name, value in asdict(tenant.quota).items() if value is not None]
    return f"{tenant.name}: {', '.join(limits) or 'no limits'}"


def _tenant_json(tenant: Tenant) -> str:
    return json.dumps(asdict(tenant))


def _key_line(key: ApiKey) -> str:
    until = "never" if key.expires is None else datetime.fromtimestamp(key.expires, UTC).isoformat()
    scopes = ",".join(sorted(key.scopes))
    return f"{key.id}: {key.tenant} {key.name} {scopes}, {key.state(time.time())}, expires {until}"


def _key_json(key: ApiKey) -> str:
    values = asdict(key) | {"scopes": sorted(key.scopes), "state": key.state(time.time())}
    del values["digest"]
    return json.dumps(values)
