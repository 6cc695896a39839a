"""The commands `molex train` and `molex evaluate`, as functions that a typer app registers.

Their parameters are the fields of `TrainArguments` and `EvaluateArguments`: typer reads the
signature of a function, so each command is given the signature of its dataclass.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from molex.errors import MolexError
from molex.train.arguments import EvaluateArguments, TrainArguments
from molex.train.loop import Listener
from molex.train.metrics import Metrics
from molex.train.recipe import RECORD_FILE, evaluate_adapter, train_adapter

Arguments = TypeVar("Arguments", TrainArguments, EvaluateArguments)

# Progress and errors go to stderr: stdout carries results only.
_CONSOLE = Console(stderr=True)


def _command(kind: type[Arguments], name: str, body: Callable[[Arguments], None]) -> Callable[..., None]:
    """A function with one keyword parameter for each field of `kind`, for typer to register."""

    def command(**values: Any) -> None:
        with _clear_errors():
            body(kind(**values))

    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    command.__name__ = name
    command.__doc__ = kind.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {name: hints[name] for name in hints}
    return command


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Say what is wrong with the input in one line and exit with status 1."""
    try:
        yield
    except MolexError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


class _Bar(Listener):
    """Shows the steps as a progress bar and every epoch as a line above it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def on_note(self, note: str) -> None:
        self._print(note)

    def on_step(self, step: int, total: int, loss: float) -> None:
        if self.task is None:
            self.task = self.progress.add_task("training", loss=loss)
        self.progress.update(self.task, completed=step, total=total, loss=loss)

    def on_epoch(self, record: Metrics) -> None:
        self._print("  ".join(f"{name} {value:.4g}" for name, value in record.items()))

    def _print(self, line: str) -> None:
        self.progress.console.print(line, highlight=False)


def _train(arguments: TrainArguments) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_CONSOLE) as progress:
        record = train_adapter(arguments, listener=_Bar(progress))
    _print_metrics(f"Best epoch {record['best_epoch'] + 1}", record["metrics"])
    typer.echo(f"{arguments.output}: adapter and {RECORD_FILE} written")


def _evaluate(arguments: EvaluateArguments) -> None:
    result = evaluate_adapter(arguments)
    if arguments.json:
        typer.echo(json.dumps(result))
        return
    if result["data"]["truncated"]:
        typer.echo(f"{result['data']['truncated']} items were cut to fit", err=True)
    _print_metrics(f"{result['data']['items']} items", result["metrics"])


def _print_metrics(title: str, metrics: Metrics) -> None:
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


train = _command(TrainArguments, "train", _train)
evaluate = _command(EvaluateArguments, "evaluate", _evaluate)
