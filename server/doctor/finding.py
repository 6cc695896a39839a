"""One line of what `molex doctor` tells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A fact about a topic. `problem` names what keeps `molex serve` from working, if anything here does."""

    topic: str
    fact: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.topic:<11} {self.fact}"
