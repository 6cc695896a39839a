"""Where the time of a request went: to the metrics and into the headers of its answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter

from fastapi import Request

from server.engine import Engine
from server.sequence import Sequence

UNMATCHED = "unmatched"


def route_template(scope: object) -> str:
    """The path template of the matched route, a bounded label; never the raw URL."""
    route = scope.get("route") if isinstance(scope, dict) else None
    return str(getattr(route, "path_format", UNMATCHED))


@dataclass
class Stopwatch:
    """Measures the stages of one request, in seconds. `deadline` is on the clock of the event loop."""

    deadline: float
    created: float = field(default_factory=perf_counter)
    tokenized: float = 0.0
    loaded: float = 0.0

    def tokenization_done(self) -> None:
        self.tokenized = perf_counter()

    def loading_done(self) -> None:
        """The adapter is in memory; loading began beside tokenization."""
        self.loaded = perf_counter()

    def stages(self, sequences: Seq[Sequence]) -> dict[str, float]:
        """A request tokenizes and loads once; queue and forward are those of its slowest sequence."""
        return {
            "tokenize": self.tokenized - self.created,
            "load": self.loaded - self.tokenized,
            "queue": max(sequence.timings.queue for sequence in sequences),
            "forward": max(sequence.timings.forward for sequence in sequences),
        }

    def record(self, request: Request, engine: Engine, sequences: Seq[Sequence]) -> dict[str, str]:
        """Report the stages to the metrics; returns headers in milliseconds, named as TEI's."""
        stages = self.stages(sequences)
        route = route_template(request.scope)
        for stage, seconds in stages.items():
            engine.metrics.stage(route, stage, seconds)
        named = {
            "x-total-time": perf_counter() - self.created,
            "x-tokenization-time": stages["tokenize"],
            "x-queue-time": stages["queue"],
            "x-inference-time": stages["forward"],
        }
        return {name: f"{1000 * seconds:.3f}" for name, seconds in named.items()}
