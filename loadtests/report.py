"""What an experiment leaves behind: results.json with everything, report.html to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import TypeAdapter

from loadtests.charts import latency_against_load, latency_cdfs
from loadtests.config import Config
from loadtests.experiment import Run
from loadtests.latency import PERCENTILES
from loadtests.machine import Machine
from loadtests.ratios import CONFIDENCE, Ratio
from loadtests.summary import Summary

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Report:
    """An experiment and what came out. `started` is ISO 8601. Times are seconds, rates per second."""

    title: str
    started: str
    machine: Machine
    config: Config
    summaries: Sequence[Summary]
    ratios: Sequence[Ratio]
    run: Run


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write both files into the folder, which is made; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "results.json", folder / "report.html"
    data.write_bytes(TypeAdapter(Report).dump_json(report))
    page.write_text(render_page(report), encoding="utf-8")
    return [data, page]


def render_page(report: Report) -> str:
    """A page that needs nothing else. Whatever comes from the configuration is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": _milliseconds, "interval": _interval}
    # matplotlib has escaped the text in its own output.
    return environment.get_template(TEMPLATE).render(
        report=report,
        percentiles=PERCENTILES,
        confidence=CONFIDENCE,
        cdfs=Markup(latency_cdfs(report.run)),
        curves=Markup(latency_against_load(report.run, report.summaries)),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if math.isfinite(seconds) else "failed"


def _interval(ratio: Ratio) -> str:
    if not math.isfinite(ratio.estimate):
        return "–"
    bounds = f"{ratio.low:.2f}, {ratio.high:.2f}" if math.isfinite(ratio.high - ratio.low) else "–"
    return f"{ratio.estimate:.2f} [{bounds}]"
