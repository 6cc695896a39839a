"""All figures of a folder in one file to read and one for programs.

    python -m benchmarks.table runs/bench

Merges the files that the benchmarks left there (`benchmarks.figures.save`) into figures.json and figures.md.
Figures of different machines, commits or versions come in tables of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure

MERGED = "figures.json"
TABLE = "figures.md"
COLUMNS = ("figure", "what", "value", "bound", "", "medians")

Record = dict[str, Any]
"""A file of `benchmarks.figures.save`."""


def read_records(folder: Path) -> list[Record]:
    """The records of a folder by script."""
    paths = sorted(path for path in folder.glob("*.json") if path.name != MERGED)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def render(records: Sequence[Record]) -> str:
    """A Markdown page with one section for each machine, commit and set of versions."""
    conditions: list[tuple[Any, Any]] = []
    for record in records:
        if (found := (record["machine"], record["versions"])) not in conditions:
            conditions.append(found)
    sections = []
    for condition in conditions:
        alike = [record for record in records if (record["machine"], record["versions"]) == condition]
        sections.append("\n".join([*_head(alike), "", *_table(alike)]))
    return "# Figures\n\n" + "\n\n".join(sections) + "\n"


def _head(records: Sequence[Record]) -> Iterator[str]:
    machine = records[0]["machine"]
    versions = {"python": machine["python"], **records[0]["versions"]}
    for record in records:
        versions |= record["peers"]
    dates = sorted(record["date"] for record in records)
    flags = " ".join(machine["flags"]) or "none that matter"
    yield f"- CPU: {machine['cpu']}; {machine['cores']} cores, {machine['threads']} threads in PyTorch"
    yield f"- flags: {flags}; PyTorch's kernels: {machine['kernels']}"
    if "gpu" in machine:
        yield f"- GPU: {machine['gpu']}"
    yield f"- memory: {machine['memory_gib']} GiB; system: {machine['system']}"
    yield "- " + ", ".join(f"{name} {number}" for name, number in versions.items())
    yield f"- commit: {machine['commit'] or 'unknown'}"
    yield f"- measured: {dates[0]} to {dates[-1]}"


def _table(records: Sequence[Record]) -> Iterator[str]:
    figures = [Figure(**figure) for record in records for figure in record["figures"]]
    yield _row(COLUMNS)
    yield _row(["---"] * len(COLUMNS))
    for figure in sorted(figures, key=lambda figure: _place(figure.key)):
        medians = "; ".join(f"{name} {value:.4g}" for name, value in figure.measured.items())
        value = f"{figure.value:.2f} {figure.unit}"
        verdict = figure.verdict if figure.demand else ""
        yield _row([figure.key, figure.what, value, figure.demand, verdict, medians])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _place(key: str) -> list[tuple[int, str]]:
    """P4 comes before P10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key) if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    records = read_records(folder)
    if not records:
        sys.exit(f"{folder}: no benchmark has left figures there")
    merged = json.dumps(records, indent=1, ensure_ascii=False)
    (folder / MERGED).write_text(merged + "\n", encoding="utf-8")
    page = render(records)
    (folder / TABLE).write_text(page, encoding="utf-8")
    print(page, end="")


if __name__ == "__main__":
    main()
