"""How much slower one arm is than another, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from loadtests.experiment import Run
from loadtests.latency import METRICS, PERCENTILES, FloatArray, latencies, percentiles

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """A percentile of one arm over that of another, with its confidence interval.

    A number is NaN or infinite where too many requests failed for it.
    """

    over: str
    under: str
    rate: float
    metric: str
    percentile: int
    estimate: float
    low: float
    high: float


def compare_arms(run: Run, seed: int) -> list[Ratio]:
    """Every other arm over the first, at each rate, in every metric that both have."""
    found = []
    rng = np.random.default_rng(seed)
    first, *others = run.arms
    for rate, arm, metric in product(run.rates, others, METRICS):
        over = [latencies(block, metric) for block in run.of(arm, rate)]
        under = [latencies(block, metric) for block in run.of(first, rate)]
        if all(np.isfinite(np.concatenate(blocks)).any() for blocks in (over, under)):
            bounds = ratio_intervals(over, under, rng).T.tolist()
            found += [
                Ratio(arm, first, rate, metric, percentile, *bound)
                for percentile, bound in zip(PERCENTILES, bounds, strict=True)
            ]
    return found


def ratio_intervals(
    over: Sequence[FloatArray], under: Sequence[FloatArray], rng: np.random.Generator
) -> FloatArray:
    """Ratios of percentiles of pooled blocks: estimate, low and high, shape [3, number of PERCENTILES].

    Blocks are resampled, not requests: requests of a block share its moment of a noisy machine, and an
    interval that took them for independent would be too narrow. `over[n]` and `under[n]` ran one after the
    other under the same schedule, so they are drawn together.
    """
    tail = (1 - CONFIDENCE) / 2
    draws = rng.integers(len(over), size=(RESAMPLES, len(over)))
    # Failed requests make infinities, and those make NaNs, which then are the answer.
    with np.errstate(invalid="ignore"):
        estimate = _ratio(over, under)
        resampled = np.stack([_ratio([over[n] for n in draw], [under[n] for n in draw]) for draw in draws])
        return np.stack([estimate, *np.quantile(resampled, [tail, 1 - tail], axis=0)])


def _ratio(over: Sequence[FloatArray], under: Sequence[FloatArray]) -> FloatArray:
    return percentiles(np.concatenate(over)) / percentiles(np.concatenate(under))
