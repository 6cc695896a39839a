"""`molex adapter`: the adapters of a running server, and adapter folders before they are sent there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from molex.adapter_file import CONFIG_NAME, read_adapter
from molex.backbone import Backbone
from molex.errors import AdapterError, MolexError
from molex_client import Adapter, Client, ClientError
from molex_client.api import LONGEST_WAIT
from molex_client.clients import KEY_VARIABLE

T = TypeVar("T")
adapter_app = typer.Typer(help="Adapters of a running server.", no_args_is_help=True)

Url = Annotated[
    str, typer.Option(envvar="MOLEX_URL", help="Where the server listens, or its second listener.")
]
Key = Annotated[
    str | None,
    typer.Option(envvar=KEY_VARIABLE, help="API key. Others can see a command line: better in the variable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Alias = Annotated[str, typer.Argument(help="Another name of a version, such as prod.")]
Folder = Annotated[Path, typer.Argument(help=f"Folder with {CONFIG_NAME} and the weights.")]
LOCAL = "http://127.0.0.1:8000"
WIDE = 10_000


@adapter_app.command()
def push(
    folder: Folder,
    name: Annotated[str | None, typer.Option(help="Name to serve it by. Default: the folder's.")] = None,
    base: Annotated[str | None, typer.Option(help="Base it is for. Default: the one that it fits.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep its weights in memory.")] = False,
    wait: Annotated[
        float, typer.Option(min=0, max=LONGEST_WAIT, help="Seconds to wait until it serves; 0: do not wait.")
    ] = LONGEST_WAIT,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Upload an adapter as a new version, which serves once it is ready.

    Exits with 1 where it has failed, or is not ready after the wait.
    """
    name = name or folder.resolve().name
    adapter = _ask(
        url, key, lambda client: client.push_adapter(name, folder, base=base, pinned=pinned, wait=wait)
    )
    _print([adapter], as_json)
    if wait and adapter.state != "ready":
        typer.echo(f"error: {name} is {adapter.state} after {wait:g} seconds", err=True)
        sys.exit(1)


@adapter_app.command("list")
def list_adapters(as_json: AsJson = False, url: Url = LOCAL, key: Key = None) -> None:
    """The adapters that the key may use."""
    _print(_ask(url, key, Client.list_adapters), as_json)


@adapter_app.command()
def show(name: Name, as_json: AsJson = False, url: Url = LOCAL, key: Key = None) -> None:
    """One adapter with its versions."""
    adapter = _ask(url, key, lambda client: client.get_adapter(name))
    _print([adapter], as_json)
    if not as_json:
        _print_versions(adapter)


@adapter_app.command()
def rollback(
    name: Name,
    version: Annotated[
        str | None, typer.Argument(help="Number or alias. Default: the version before the current one.")
    ] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Serve an earlier version again."""
    chosen = None if version is None else _reference(version)
    _print([_ask(url, key, lambda client: client.rollback_adapter(name, chosen))], as_json)


@adapter_app.command()
def alias(
    name: Name,
    alias: Alias,
    version: Annotated[str, typer.Argument(help="Number, or another alias for what that means now.")],
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Let NAME@ALIAS mean a version, whatever it meant before."""
    _print([_ask(url, key, lambda client: client.set_alias(name, alias, _reference(version)))], as_json)


@adapter_app.command()
def unalias(name: Name, alias: Alias, url: Url = LOCAL, key: Key = None) -> None:
    """Remove an alias; the version stays."""
    _ask(url, key, lambda client: client.remove_alias(name, alias))


@adapter_app.command("rm")
def remove(
    name: Name,
    version: Annotated[int | None, typer.Option(min=1, help="Remove this version alone.")] = None,
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Remove an adapter with all its versions; requests in flight finish."""
    if version is None:
        _ask(url, key, lambda client: client.remove_adapter(name))
    else:
        _ask(url, key, lambda client: client.remove_version(name, version))


@adapter_app.command()
def validate(
    folder: Folder,
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    as_json: AsJson = False,
) -> None:
    """Check an adapter folder against its base, without a server: exactly as one reads it.

    Exits with 1 and names the tensor, field or file at fault.
    """
    logging.disable_progress_bar()
    try:
        # Of the base only the shapes matter.
        spec = Backbone.from_pretrained(base, torch.bfloat16).spec
        adapter = read_adapter(folder, spec)
    except MolexError as error:
        subject = error.subject if isinstance(error, AdapterError) else "base"
        if as_json:
            typer.echo(json.dumps({"valid": False, "subject": subject, "problem": str(error)}))
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    config = adapter.config
    if as_json:
        found = {"valid": True, "kind": config.kind, "task": config.task_type, "digest": adapter.digest}
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{folder}: a {config.kind} adapter for {config.task_type}, {adapter.digest}")


def _reference(version: str) -> int | str:
    """A version by its number or by an alias, which no number can be."""
    return int(version) if version.isdecimal() else version


def _ask(url: str, key: str | None, work: Callable[[Client], T]) -> T:
    """Do something with a server; what goes wrong ends the program in one line."""
    try:
        client = Client(url, key)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        with client:
            return work(client)
    except (ClientError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _print(adapters: Sequence[Adapter], as_json: bool) -> None:
    if as_json:
        for adapter in adapters:
            typer.echo(adapter.model_dump_json())
        return
    columns = ("name", "version", "state", "base", "kind", "task", "size", "aliases")
    _print_table(columns, map(_row, adapters))
    for adapter in adapters:
        if adapter.reason is not None:
            typer.echo(f"{adapter.name} failed to load: {adapter.reason}")


def _row(adapter: Adapter) -> Sequence[str]:
    aliases = ", ".join(f"{alias}={version}" for alias, version in sorted(adapter.aliases.items()))
    facts = (adapter.version, adapter.state, adapter.base, adapter.kind, adapter.task)
    return [adapter.name, *map(_shown, facts), _size(adapter.bytes), aliases]


def _print_versions(adapter: Adapter) -> None:
    rows = [
        [
            str(version.version),
            version.state,
            _shown(version.digest),
            _size(version.bytes),
            version.source,
            datetime.fromtimestamp(version.created, UTC).isoformat(),
            version.reason or "",
        ]
        for version in adapter.versions
    ]
    _print_table(("version", "state", "digest", "size", "source", "created", "reason"), rows)


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.1f} MB"


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Folded to the width of a terminal; as wide as it is where a file or a program reads it."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else WIDE
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)
