"""What a benchmark reached, beside the bound that it is held to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.facts import facts


@dataclass(frozen=True)
class Figure:
    """One measured number.

    `key` is its name in docs/performance.md, such as P4; `what` says what was compared, in which setting;
    `at_least` whether `value` must reach `bound` from below or stay under it, with None for a number that is
    reported beside another and held to nothing; `measured` lists the medians that it was made of, by
    contestant and unit.
    """

    key: str
    what: str
    value: float
    bound: float | None
    at_least: bool
    unit: str
    measured: Mapping[str, float]

    @property
    def held(self) -> bool:
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def verdict(self) -> str:
        return "held" if self.held else "not held"

    @property
    def demand(self) -> str:
        """The bound in words; empty where there is none."""
        return "" if self.bound is None else f"{'≥' if self.at_least else '≤'} {self.bound:g}"


def save(
    figures: Sequence[Figure], script: str, folder: Path | None, peers: Mapping[str, str] | None = None
) -> None:
    """Print figures, and keep them as `folder`/`script`.json where a folder is given.

    The file says what they were measured on too; `peers` are the versions of the contestants that run in
    environments of their own.
    """
    for figure in figures:
        demand = f" ({figure.demand}: {figure.verdict})" if figure.demand else ""
        print(f"{figure.key}  {figure.what}: {figure.value:.2f} {figure.unit}{demand}")
    if folder is not None:
        record = {"script": script, **facts(), "peers": dict(peers or {})}
        record["figures"] = [asdict(figure) for figure in figures]
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (folder / f"{script}.json").write_text(text + "\n", encoding="utf-8")
