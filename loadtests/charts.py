"""The charts of a report, as SVG to put into a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from loadtests.experiment import Run
from loadtests.latency import PERCENTILES, FloatArray, pooled
from loadtests.summary import Summary

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
DASHES = ("solid", "dashed", "dashdot", "dotted")
WIDTH = 9.5
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "loadtests",  # the same figure has the same ids every time
    "font.family": "sans-serif",
    "text.parse_math": False,  # a name may have dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "both",
    "grid.color": "#e4e4e4",
}


def latency_cdfs(run: Run) -> str:
    """For each rate, the share of requests that were answered within a time.

    A curve that ends below 1 shows that the rest failed.
    """
    with mpl.rc_context(SETTINGS):
        rows = (len(run.rates) + 1) // 2
        figure = Figure(figsize=(WIDTH, 3.2 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, sharey=True, squeeze=False).flatten().tolist()
        for panel, rate in zip(axes, run.rates, strict=False):
            for number, arm in enumerate(run.arms):
                _draw_cdf(panel, pooled(run.of(arm, rate), "total"), number)
            panel.set(title=f"{rate:.1f} requests/s", xlabel="latency in ms", ylim=(0, 1.02))
            if _has_points(panel):
                panel.set_xscale("log")
                _label_plainly(panel.xaxis)
        for panel in axes[len(run.rates) :]:
            panel.remove()
        axes[0].set_ylabel("share of requests")
        _add_legend(figure, run.arms)
        return _svg(figure)


def latency_against_load(run: Run, summaries: Sequence[Summary]) -> str:
    """Median and 99th percentile of each arm over the rate. A point is missing where that request failed."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        for panel, percentile in zip(figure.subplots(1, 2), (50, 99), strict=True):
            index = PERCENTILES.index(percentile)
            for number, arm in enumerate(run.arms):
                points = [(s.rate, s.latency["total"][index]) for s in summaries if s.arm == arm if s.latency]
                rates, latencies = np.array(points, np.float64).reshape(-1, 2).T
                panel.plot(rates, latencies * 1e3, marker="o", **_style(number))
            panel.set(title=f"p{percentile}", xlabel="requests/s, intended", xlim=(0, max(run.rates) * 1.1))
            if _has_points(panel):
                panel.set_yscale("log")
                _label_plainly(panel.yaxis)
        figure.axes[0].set_ylabel("latency in ms")
        _add_legend(figure, run.arms)
        return _svg(figure)


def _draw_cdf(panel: Axes, values: FloatArray, number: int) -> None:
    answered = np.sort(values[np.isfinite(values)])
    shares = np.arange(1, len(answered) + 1) / max(1, len(values))
    panel.step(answered * 1e3, shares, where="post", **_style(number))


def _has_points(panel: Axes) -> bool:
    """A logarithmic axis cannot be drawn without any: all requests failed."""
    return bool(np.isfinite(panel.dataLim.get_points()).all())


def _label_plainly(axis: Axis) -> None:
    """Numbers at the ticks of a logarithmic axis, where matplotlib would set powers in its markup."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def _add_legend(figure: Figure, arms: Sequence[str]) -> None:
    handles = [Line2D([], [], **_style(number)) for number in range(len(arms))]
    figure.legend(handles, arms, loc="outside upper center", ncols=4, frameon=False)


def _svg(figure: Figure) -> str:
    """The <svg> element alone: what precedes it is for files, and its metadata names other sites."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
