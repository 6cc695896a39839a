"""The `molex` command."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import socket
from types import FrameType, NoneType
from typing import Annotated, Any, get_args

import typer
import uvicorn
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console

from molex.convert import convert
from molex.errors import MolexError
from molex.export import export
from molex.exported import Precision
from molex.memory import freeze_what_is_loaded, keep_compiled_kernels, keep_freed_memory
from molex.merge import merge
from molex.train.cli import evaluate, train
from server import logs
from server.adapter_cli import adapter_app
from server.app import create_app
from server.auth.access import Access
from server.banner import banner
from server.catalogue.database import migrate
from server.catalogue_cli import audit_app, key_app, tenant_app
from server.doctor.checks import examine
from server.engine import Engine
from server.errors import ServiceError
from server.precision import precision_of
from server.protocol import bounded_protocol
from server.settings import Settings, is_option, problems, shown

DRAIN_LOOK_SECONDS = 0.1
"""While requests finish, how often to look whether the grace is over or Ctrl-C was pressed again."""
log = logging.getLogger(__name__)
app = typer.Typer(
    name="molex",
    help="Serve, train and convert transformers finetuned with MoLEx and LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


class Server(uvicorn.Server):
    """uvicorn, which tells when it is up, and stops being ready as soon as it is told to stop."""

    def __init__(self, engine: Engine, access: Access, refused: Mapping[str, str]) -> None:
        settings = engine.settings
        super().__init__(
            uvicorn.Config(
                create_app(engine, access),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                http=bounded_protocol(settings.max_client_seconds),
                ws="none",
                timeout_keep_alive=math.ceil(settings.max_client_seconds),
                timeout_graceful_shutdown=settings.grace_seconds,
            )
        )
        self._engine = engine
        self._access = access
        self._refused = refused

    async def serve(self, sockets: list[socket] | None = None) -> None:
        settings = self._engine.settings
        if settings.admin_port is not None:
            second = uvicorn.Config(
                self.config.app, host=settings.admin_host, port=settings.admin_port, log_config=None
            )
            sockets = [self.config.bind_socket(), second.bind_socket()]
            self._access.admin_port = sockets[1].getsockname()[1]
        await super().serve(sockets)

    async def startup(self, sockets: list[Any] | None = None) -> None:
        freeze_what_is_loaded()
        await super().startup(sockets)
        if self.started:
            settings = self._engine.settings
            port = self.servers[0].sockets[0].getsockname()[1]
            url = _url(settings.host, port)
            admin_url = _url(settings.admin_host, self._access.admin_port) if len(self.servers) > 1 else url
            Console(highlight=False, markup=False, soft_wrap=True).print(
                banner(self._engine, url, admin_url, self._refused)
            )

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._engine.lost

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Listen on, to tell whoever comes to go elsewhere, until what was there before has its answers.

        uvicorn then has what is left of the grace.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + self._engine.settings.grace_seconds
        left = set(self.server_state.tasks)
        while left and clock() < end and not self.force_exit:
            _, left = await asyncio.wait(left, timeout=DRAIN_LOOK_SECONDS)
        self.config.timeout_graceful_shutdown = max(0, math.ceil(end - clock()))
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.draining = True
        if sig == signal.SIGTERM:
            # uvicorn would end the process by this signal after all; it ends in order, with 0.
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)


def _url(host: str, port: int | None) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(settings: Settings) -> None:
    """Load everything, then serve until SIGTERM or SIGINT."""
    logs.configure(settings)
    if settings.catalogue:
        migrate(settings.catalogue[0])
    keep_freed_memory()
    keep_compiled_kernels()
    for name, source in settings.bases.items():
        precision = precision_of(source, settings)
        Console(stderr=True).print(f"Loading {name} in {precision} …", highlight=False)
    engine = Engine.load(settings)
    refused = engine.adapters.load_folder(settings.adapters) if settings.adapters else {}
    # uvicorn has shut down in order by then and only passes Ctrl-C on.
    with suppress(KeyboardInterrupt):
        asyncio.run(Server(engine, Access.load(settings), refused).serve())
    if engine.lost:
        sys.exit("the worker thread is stuck or has died: this process ends, to be started anew")


def serve(**options: Any) -> None:
    """Serve base models and their adapters over HTTP."""
    try:
        run_server(_settings(options))
    except (MolexError, ServiceError) as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


def show_config(**options: Any) -> None:
    """Print every setting as `molex serve` would take it from here, without secrets."""
    typer.echo("\n".join(shown(_settings(options))))


def doctor(**options: Any) -> None:
    """Say what this machine offers and whether `molex serve` would work with these options."""
    # What it logs is told below.
    logging.basicConfig(handlers=[logging.NullHandler()])
    found = []
    for finding in examine(_given(options)):
        typer.echo(str(finding))
        if finding.problem is not None:
            found.append(finding.problem)
    for problem in found:
        typer.echo(f"problem: {problem}", err=True)
    if found:
        sys.exit(1)
    typer.echo("molex serve would work with these options")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that stand on the command line."""
    return {name: value for name, value in options.items() if value not in (None, [])}


def _settings(options: Mapping[str, Any]) -> Settings:
    """The settings that a command line gives; what is wrong with them ends the program."""
    try:
        return Settings(**_given(options))
    except ValidationError as error:
        typer.echo("\n".join(problems(error)), err=True)
        sys.exit(2)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """The command line option of one setting."""
    extra = field.json_schema_extra
    flag = extra.get("flag") if isinstance(extra, dict) else None
    kind = list[str] if flag else _plain_type(field.annotation)
    default = "" if flag or field.default is None else f" (default: {field.default})"
    option = typer.Option(str(flag or "--" + name.replace("_", "-")), help=f"{field.description}{default}")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _plain_type(annotation: Any) -> Any:
    """`X` for `X | None`."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(annotation) else annotation


def _with_settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command one option for each setting, so that settings are spelled in one place."""
    options = [_option(name, field) for name, field in Settings.model_fields.items() if is_option(field)]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return command


@contextmanager
def problems_told() -> Iterator[None]:
    """What is wrong with what a command was given ends the program, and is all that it prints."""
    try:
        yield
    except MolexError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="Folder of an official MoLEx checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Adapter folder to write.")],
    base_out: Annotated[Path | None, typer.Option(help="Folder to write the base model to.")] = None,
) -> None:
    """Turn an official MoLEx checkpoint into an adapter and, if asked, its base."""
    with problems_told():
        convert(source, output, base_out)
    typer.echo(f"{output}: adapter written")


def merge_adapter(
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    adapter: Annotated[Path, typer.Option(help="Folder of a LoRA adapter for it.")],
    base_out: Annotated[Path, typer.Option(help="Folder to write the merged base to.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write the classification head to, as an adapter.")
    ] = None,
) -> None:
    """Fold a LoRA adapter into a copy of its base."""
    with problems_told():
        merge(base, adapter, base_out, output)
    typer.echo(f"{base_out}: base written" + (f"\n{output}: adapter written" if output else ""))


def export_base(
    base: Annotated[str, typer.Argument(help="Folder or hub id of a base model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, a base that runs on ONNX Runtime.")],
    precision: Annotated[Precision, typer.Option(help="Of the weights of layers.")] = "fp32",
    routed_precision: Annotated[
        Precision | None, typer.Option(help="Of routed layers alone. Default: that of the others.")
    ] = None,
) -> None:
    """Write a base model with its layers as ONNX graphs, two a layer."""
    with problems_told():
        export(base, output, precision, routed_precision)
    typer.echo(f"{output}: base written, serve it with --base NAME={output} --precision auto")


app.command()(_with_settings_as_options(serve))
app.command()(_with_settings_as_options(doctor))
app.command()(train)
app.command()(evaluate)
app.command("convert")(convert_checkpoint)
app.command("merge")(merge_adapter)
app.command("export")(export_base)
config_app = typer.Typer(help="Settings.", no_args_is_help=True)
config_app.command("show")(_with_settings_as_options(show_config))
app.add_typer(config_app, name="config")
app.add_typer(adapter_app, name="adapter")
app.add_typer(tenant_app, name="tenant")
app.add_typer(key_app, name="key")
app.add_typer(audit_app, name="audit")
