"""What MoLEx costs: a packed batch of MoLEx adapters against one of LoRA adapters and the bare base.

    python -m benchmarks.bench_molex [--rounds 7] [--shapes demo-encoder roberta-base-shape]

Every depth is mixed and the gates are random, so the requests of a batch spread over many layers: the
worst case for grouping. An exact MoLEx forward runs up to two layers at each depth.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import (
    DTYPES,
    Contestant,
    OwnEngine,
    base_folder,
    compare_all,
    measure,
    random_adapter,
    report,
    sentences,
    zipf,
)
from molex.config import MolexConfig

REQUESTS = 128


def compare(shape: str, count: int, rounds: int, scratch: Path) -> None:
    folder = base_folder(shape, scratch)
    inputs, chosen = sentences(REQUESTS, seed=1), zipf(REQUESTS, count, seed=2)
    contestants: dict[str, Contestant] = {}
    for dtype in DTYPES:
        engine = OwnEngine(folder, dtype)
        spec = engine.model.spec
        mixture = MolexConfig(mixed_depths=tuple(range(spec.num_layers)))
        for kind, molex in (("LoRA", None), ("MoLEx", mixture)):
            adapters = [random_adapter(spec, seed=n, molex=molex) for n in range(count)]
            contestants[f"{kind} {dtype}"] = engine.contestant(inputs, [adapters[n] for n in chosen])
        contestants[f"base {dtype}"] = engine.bare(inputs)
    medians = measure(contestants, rounds)
    ratios = {}
    for dtype in DTYPES:
        for kind, over in (("MoLEx", "LoRA"), ("LoRA", "base"), ("MoLEx", "base")):
            ratios[f"{kind} / {over}, {dtype}"] = medians[f"{kind} {dtype}"] / medians[f"{over} {dtype}"]
    report(f"{shape}: {REQUESTS} sentences over {len(set(chosen))} of {count} adapters", medians, ratios)


if __name__ == "__main__":
    compare_all(__doc__ or "", compare)
