"""The command line of load tests."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Annotated

import typer

from loadtests.config import Config, read_config
from loadtests.errors import ConfigError, LoadTestError
from loadtests.measure import measure
from loadtests.report import write_report
from loadtests.texts import read_texts

app = typer.Typer(
    help="Put open-loop load on running servers and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Put open-loop load on running servers and compare them."""


@app.command()
def run(
    config: Annotated[Path, typer.Option(help="The experiment, a TOML file.")],
    output: Annotated[Path, typer.Option(help="Folder to write results.json and report.html to.")],
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Permit URLs that are not of this machine.")
    ] = False,
) -> None:
    """Run an experiment and report on it."""
    _allow_open_files()
    try:
        experiment = read_config(config, allow_remote=allow_remote)
        report = measure(experiment, _texts(config, experiment), config.stem, print)
    except LoadTestError as error:
        typer.echo(str(error), err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    for path in write_report(report, output):
        print(path)


def _allow_open_files() -> None:
    """Each request in flight has a connection: more than the usual 1024 files while a server stalls."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _texts(path: Path, config: Config) -> list[str]:
    """The texts that the configuration in a file names. Raises ConfigError."""
    try:
        return read_texts(path.parent / config.texts)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: texts: {error}") from None
