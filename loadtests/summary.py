"""Rates, outcomes and percentiles of each arm at each rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from loadtests.client import Outcome
from loadtests.experiment import Block, Run
from loadtests.latency import METRICS, percentiles, pooled, pooled_stages


@dataclass(frozen=True)
class Summary:
    """An arm at one rate, over all its blocks. Rates are per second, latencies seconds.

    `latency`: percentiles by metric, in the order of PERCENTILES, without metrics in which nothing was
    measured; infinite where the request of that rank failed. `stages`: percentiles of what the server told of
    the requests that it answered. `lateness`: by how much the generator itself
    missed due times, 99th percentile; it is part of the latencies.
    """

    arm: str
    rate: float
    achieved_rate: float
    throughput: float
    outcomes: dict[str, int]
    statuses: dict[int, int]
    lateness: float
    latency: dict[str, list[float]]
    stages: dict[str, list[float]]

    @property
    def num_failed(self) -> int:
        return sum(self.outcomes.values()) - self.outcomes[Outcome.OK]


def summarise(run: Run) -> list[Summary]:
    """One summary for each rate, ascending, and arm."""
    return [_summary(run.of(arm, rate)) for rate, arm in product(run.rates, run.arms)]


def _summary(blocks: Sequence[Block]) -> Summary:
    results = [result for block in blocks for result in block.results]
    # Under overload, requests go out and answers come in after the last one was due.
    sending = sum(max([block.seconds, *(result.sent for result in block.results)]) for block in blocks)
    answering = sum(max([block.seconds, *(result.end for result in block.results)]) for block in blocks)
    outcomes = Counter(result.outcome for result in results)
    statuses = Counter(result.status for result in results if result.status is not None)
    latency = {metric: pooled(blocks, metric) for metric in METRICS}
    return Summary(
        arm=blocks[0].arm,
        rate=blocks[0].rate,
        achieved_rate=len(results) / sending,
        throughput=outcomes[Outcome.OK] / answering,
        outcomes={outcome.value: outcomes[outcome] for outcome in Outcome},
        statuses=dict(sorted(statuses.items())),
        lateness=float(percentiles(np.array([result.sent - result.due for result in results]))[-1]),
        latency={
            metric: percentiles(values).tolist()
            for metric, values in latency.items()
            if np.isfinite(values).any()
        },
        stages={stage: percentiles(values).tolist() for stage, values in pooled_stages(blocks).items()},
    )
