"""Which model of an arm each request goes to."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

PLAIN = ("uniform", "identical", "distinct")
_ZIPF = re.compile(r"zipf:(\d+(?:\.\d+)?)")


def check_popularity(text: str) -> str:
    """The text itself. Raises ValueError unless it is uniform, identical, distinct or zipf:EXPONENT."""
    if text not in PLAIN and not _ZIPF.fullmatch(text):
        raise ValueError(f"{text!r} is none of {', '.join(PLAIN)} and zipf:EXPONENT")
    return text


def choose_models(
    popularity: str, num_models: int, count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Model numbers of `count` requests, shape [count].

    `uniform` draws all models alike; `zipf:a` draws the model of rank r with weight r ** -a; `identical`
    takes the first model always; `distinct` takes the models in turn, so that requests share a model only
    when more of them run at a time than there are models.
    """
    if popularity == "identical":
        return np.zeros(count, np.int64)
    if popularity == "distinct":
        return np.resize(rng.permutation(num_models), count)
    weights = np.arange(1, num_models + 1, dtype=np.float64) ** -_exponent(popularity)
    return rng.choice(num_models, size=count, p=weights / weights.sum())


def _exponent(popularity: str) -> float:
    """Of Zipf's law; uniform is the exponent 0."""
    found = _ZIPF.fullmatch(popularity)
    return float(found[1]) if found else 0.0
