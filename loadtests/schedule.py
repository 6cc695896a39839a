"""What is sent and when, drawn before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtests.popularity import choose_models


@dataclass(frozen=True)
class Planned:
    """One request to come. `due`: seconds from the start of its block."""

    due: float
    model: str
    text: str


@dataclass(frozen=True)
class Traffic:
    """What requests draw from."""

    texts: Sequence[str]
    models: Sequence[str]
    popularity: str

    def plan(self, due: npt.NDArray[np.float64], rng: np.random.Generator) -> list[Planned]:
        """A request for each due time, in seconds, shape [count]."""
        texts = rng.integers(len(self.texts), size=len(due))
        models = choose_models(self.popularity, len(self.models), len(due), rng)
        return [
            Planned(float(time), self.models[model], self.texts[text])
            for time, model, text in zip(due, models, texts, strict=True)
        ]


def poisson_arrivals(rate: float, seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Due times in seconds, ascending, of a Poisson process with `rate` arrivals a second, shape [count].

    The number of arrivals is Poisson and, given the number, the times are independent and uniform: the same
    process as one with exponential gaps.
    """
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))
