"""What metrics learn of a step."""

from __future__ import annotations

from time import perf_counter

from molex.routing import Route
from server.metrics import Metrics
from server.runner import StepOutput
from server.sequence import Sequence


def record(metrics: Metrics, base: str, output: StepOutput) -> None:
    """Count the passes of a step, and the tokens and routes that they brought."""
    for stats in output.stats:
        metrics.batch(base, stats.tokens, stats.distinct_adapters, stats.distinct_layers)
    now = perf_counter()
    for update in output.updates:
        sequence = update.sequence
        if update.error is not None:
            continue
        if len(sequence.output_ids) <= 1:
            _record_route(metrics, base, sequence)
        if sequence.output_ids:
            _record_token(metrics, base, sequence, now)


def _record_token(metrics: Metrics, base: str, sequence: Sequence, now: float) -> None:
    timings = sequence.timings
    if len(sequence.output_ids) == 1:
        metrics.first_token(base, now - timings.created)
        metrics.reused(base, sequence.num_reused)
    else:
        metrics.next_token(base, now - timings.last_token)
    timings.last_token = now


def _record_route(metrics: Metrics, base: str, sequence: Sequence) -> None:
    molex = sequence.adapter.molex
    route: Route = sequence.route or ()
    for depth, choice in zip(molex.mixed_depths if molex else (), route, strict=True):
        for layer in choice.layers:
            metrics.routed(base, depth, layer)
