"""Measures LoRA and MoLEx, with both gate gradients, on real data at equal LoRA settings.

    python -m scripts.quality run      # trains what is missing, one JSON line per finished run
    python -m scripts.quality table    # prints the Markdown table of docs/quality.md

A run that was interrupted continues from its last checkpoint; finished runs are skipped. The best
epoch is chosen on data that the reported score does not see: SST-2 and TREC choose on dev and report
test. CoLA has no public test labels, so a tenth of its training file chooses and dev is reported.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from molex.train.arguments import Dtype, EvaluateArguments, TrainArguments
from molex.train.recipe import RECORD_FILE, Base, evaluate_adapter, load_base, train_adapter

app = typer.Typer(add_completion=False, help=__doc__)

SEEDS = (0, 1, 2)
COMMON: dict[str, Any] = {"r": 8, "lora_alpha": 16.0, "learning_rate": 1e-3, "batch_size": 32}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "MoLEx, gate gradient none": {"method": "molex", "gate_gradient": "none"},
    "MoLEx, straight-through": {"method": "molex", "gate_gradient": "straight_through"},
}


@dataclass(frozen=True)
class Task:
    """A data set: what trains, what chooses the epoch, what is reported, and by which metric."""

    folder: str
    metric: str
    epochs: int
    reported: str = "test"
    held_out: bool = False
    """Whether a tenth of the training file chooses the epoch."""


TASKS = {
    "TREC": Task("trec", "accuracy", epochs=3),
    "SST-2": Task("sst2", "accuracy", epochs=2),
    "CoLA": Task("cola", "matthews", epochs=3, reported="dev", held_out=True),
}

Results = Annotated[Path, typer.Option(help="One JSON line for each finished run.")]


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    task: str
    method: str
    seed: int


@dataclass(frozen=True)
class Setup:
    """Where a grid reads and writes, and how the base runs."""

    base: Path
    data: Path
    work: Path
    dtype: Dtype


def all_runs() -> Iterator[Run]:
    """Every cell, seed by seed, so that a partial grid already compares the methods."""
    for seed in SEEDS:
        for task in TASKS:
            for method in METHODS:
                yield Run(task, method, seed)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_of(task: Task, setup: Setup) -> tuple[Path, Path, Path]:
    """The files that train, choose and report."""
    folder = setup.data / task.folder
    reported = folder / f"{task.reported}.tsv"
    if not task.held_out:
        return folder / "train.tsv", folder / "dev.tsv", reported
    split = setup.work / "data"
    return split / f"{task.folder}-fit.tsv", split / f"{task.folder}-choose.tsv", reported


def hold_out(setup: Setup) -> None:
    """Write the splits of the tasks that need one: every tenth row chooses, the others train."""
    for task in (task for task in TASKS.values() if task.held_out):
        text = (setup.data / task.folder / "train.tsv").read_text(encoding="utf-8")
        header, *rows = text.rstrip("\n").split("\n")
        fit, choose, _ = files_of(task, setup)
        fit.parent.mkdir(parents=True, exist_ok=True)
        parts = {fit: [r for n, r in enumerate(rows) if n % 10], choose: rows[::10]}
        for path, lines in parts.items():
            path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


@cache
def _base(folder: Path, dtype: str) -> Base:
    """One load for all runs of a worker."""
    return load_base(str(folder), dtype)


def execute(run: Run, setup: Setup) -> dict[str, Any]:
    """Train one cell and measure what is reported."""
    started, started_cpu = time.perf_counter(), time.process_time()
    task = TASKS[run.task]
    fit, choose, reported = files_of(task, setup)
    slug = "-".join((task.folder, *METHODS[run.method].values(), str(run.seed)))
    output = setup.work / "runs" / slug
    base = _base(setup.base, setup.dtype)
    arguments = TrainArguments(
        base=str(setup.base),
        train=fit,
        eval=choose,
        output=output,
        epochs=task.epochs,
        metric=task.metric,
        seed=run.seed,
        dtype=setup.dtype,
        resume=True,
        **COMMON,
        **METHODS[run.method],
    )
    record = _trained(arguments, base)
    measured = evaluate_adapter(
        EvaluateArguments(base=str(setup.base), adapter=output, data=reported, dtype=setup.dtype),
        base,
    )
    return asdict(run) | {
        "metric": task.metric,
        "reported_on": reported.name,
        "score": measured["metrics"][task.metric],
        "metrics": measured["metrics"],
        "chosen_score": record["metrics"][task.metric],
        "best_epoch": record["best_epoch"],
        "epochs": record["epochs"],
        "trainable_parameters": record["trainable_parameters"],
        "dtype": setup.dtype,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "data": record["data"],
        "versions": record["versions"],
    }


def _trained(arguments: TrainArguments, base: Base) -> dict[str, Any]:
    """Train, unless an earlier process finished that and was stopped before it measured."""
    finished = arguments.output / RECORD_FILE
    if finished.exists():
        record: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return record
    return train_adapter(arguments, base)


def table(results: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over the seeds, as Markdown."""
    lines = [
        "| task | metric | method | score | parameters | CPU seconds a run | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, task in TASKS.items():
        for method in METHODS:
            rows = [r for r in results if (r["task"], r["method"]) == (name, method)]
            if rows:
                lines.append(_line(name, task, method, rows))
    return "\n".join(lines)


def _line(name: str, task: Task, method: str, rows: list[dict[str, Any]]) -> str:
    scores = [100 * row["score"] for row in rows]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    seconds = statistics.mean(row["cpu_seconds"] for row in rows)
    cells = (
        name,
        f"{task.metric} × 100, {task.reported}",
        method,
        f"{statistics.mean(scores):.1f}{spread}",
        f"{rows[0]['trainable_parameters']:,}",
        f"{seconds:.0f}",
        str(len(rows)),
    )
    return f"| {' | '.join(cells)} |"


@app.command("run")
def run_grid(
    base: Path = Path(".models/e5-small"),
    data: Path = Path("../shared/data"),
    work: Annotated[Path, typer.Option(help="Adapters and checkpoints.")] = Path(".quality"),
    results: Results = Path("docs/quality.jsonl"),
    dtype: Annotated[Dtype, typer.Option(help="Of the base.")] = "bfloat16",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, of one thread each.")] = 2,
) -> None:
    """Train and measure every cell that has no result yet."""
    setup = Setup(base, data, work, dtype)
    hold_out(setup)
    done = {Run(row["task"], row["method"], row["seed"]) for row in read_results(results)}
    missing = [run for run in all_runs() if run not in done]
    failed = 0
    print(f"{len(done)} runs done, {len(missing)} to go", flush=True)
    with ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        futures = [pool.submit(execute, run, setup) for run in missing]
        for future in as_completed(futures):
            if error := future.exception():
                failed += 1
                print(f"failed: {error}", flush=True)
                continue
            row = future.result()
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            where = f"{row['task']}, {row['method']}, seed {row['seed']}"
            print(f"{where}: {row['score']:.4f} in {row['seconds']:.0f} s", flush=True)
    if failed:
        raise typer.Exit(1)


@app.command("table")
def print_table(results: Results = Path("docs/quality.jsonl")) -> None:
    """Print the results as a Markdown table."""
    print(table(read_results(results)))


if __name__ == "__main__":
    app()
