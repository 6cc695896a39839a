"""Latencies of requests in seconds, and their percentiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from loadtests.client import STAGES, Outcome, Result
from loadtests.experiment import Block

FloatArray = npt.NDArray[np.float64]
PERCENTILES = (50, 90, 95, 99)


def _total(result: Result) -> list[float]:
    return [result.end - result.due if result.outcome is Outcome.OK else math.inf]


def _first_piece(result: Result) -> list[float]:
    if result.outcome is not Outcome.OK:
        return [math.inf]
    return [piece - result.due for piece in result.pieces[:1]]


def _between_pieces(result: Result) -> list[float]:
    return np.diff(result.pieces).tolist() if result.outcome is Outcome.OK else []


METRICS: dict[str, Callable[[Result], list[float]]] = {
    "total": _total,
    "first token": _first_piece,
    "between tokens": _between_pieces,
}
"""Latencies by metric; the first two count from the due time.

A request that failed took forever: a server must not look fast because it refuses what it cannot serve.
"""


def latencies(block: Block, metric: str) -> FloatArray:
    """Of all requests of a block, in seconds, shape [count]."""
    return np.array([value for result in block.results for value in METRICS[metric](result)], np.float64)


def pooled(blocks: Iterable[Block], metric: str) -> FloatArray:
    """Of all requests of all blocks, in seconds, shape [count]."""
    return np.concatenate([latencies(block, metric) for block in blocks])


def pooled_stages(blocks: Iterable[Block]) -> dict[str, FloatArray]:
    """What servers told of the requests of all blocks, in seconds, shape [count], by stage."""
    told = [result.stages for block in blocks for result in block.results]
    stages = {stage: [times[stage] for times in told if stage in times] for stage in STAGES}
    return {stage: np.array(seconds) for stage, seconds in stages.items() if seconds}


def percentiles(values: FloatArray) -> FloatArray:
    """The values of rank ceil(p · count), shape [number of PERCENTILES]; NaN of no values.

    No interpolation: between a finite and an infinite latency there is nothing.
    """
    if not len(values):
        return np.full(len(PERCENTILES), np.nan)
    ranks = [math.ceil(percentile * len(values) / 100) - 1 for percentile in PERCENTILES]
    return np.partition(values, ranks)[ranks]
