"""What MoLEx costs: a packed batch of MoLEx adapters against one of LoRA adapters and the bare base.

    python -m benchmarks.bench_molex [--rounds 7] [--shapes …] [--requests …] [--adapters …]

An exact MoLEx forward runs up to two layers at each depth. Every depth is mixed and the gates are random, so
the requests of a batch spread over all layers: the worst case for grouping. The demo encoder runs trained
gates as well: its tenants are copies of the example adapters, half of SST-2 and half of TREC, and their texts
come from the test files of both in ../shared/data. The LoRA arm has the same low-rank updates and no gates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import (
    DEMO_ENCODER,
    DTYPES,
    Contestant,
    OwnEngine,
    Setting,
    compare_all,
    measure,
    random_adapter,
    report,
    sentences,
    zipf,
)
from molex import Adapter, read_adapter
from molex.config import MolexConfig
from molex.tokenizer import load_tokenizer
from molex.train.data import read_labelled

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TRAINED = ("sst2", "trec")


def without_gates(adapter: Adapter) -> Adapter:
    """The LoRA adapter inside a MoLEx adapter."""
    return replace(adapter, config=replace(adapter.config, molex=None), gates={})


def random_gates(engine: OwnEngine, setting: Setting) -> dict[str, Contestant]:
    """Random adapters on random tokens, with and without gates, and the bare base."""
    spec = engine.model.spec
    inputs = sentences(setting.requests, seed=1)
    chosen = zipf(setting.requests, setting.adapters, seed=2)
    mixture = MolexConfig(mixed_depths=tuple(range(spec.num_layers)))
    tenants = [random_adapter(spec, seed=n, molex=mixture) for n in range(setting.adapters)]
    return {"base": engine.bare(inputs)} | both_kinds(engine, inputs, tenants, chosen, "")


def trained_gates(engine: OwnEngine, setting: Setting) -> dict[str, Contestant]:
    """Copies of the example adapters on the texts that they were trained for."""
    model, rng = engine.model, random.Random(1)
    tokenizer = load_tokenizer(DEMO_ENCODER, model.spec)
    texts = {task: read_labelled(DATA / task / "test.tsv").examples for task in TRAINED}
    tasks = [TRAINED[n % 2] for n in range(setting.adapters)]
    folders = [ROOT / "examples" / "adapters" / f"{task}-molex" for task in tasks]
    tenants = [read_adapter(folder, model.spec, model.dtype, model.device) for folder in folders]
    chosen = zipf(setting.requests, setting.adapters, seed=2)
    inputs = [tokenizer(rng.choice(texts[tasks[n]]).text)["input_ids"] for n in chosen]
    return both_kinds(engine, inputs, tenants, chosen, ", trained gates")


def both_kinds(
    engine: OwnEngine,
    inputs: Sequence[Sequence[int]],
    tenants: Sequence[Adapter],
    chosen: Sequence[int],
    note: str,
) -> dict[str, Contestant]:
    plain = [without_gates(tenant) for tenant in tenants]
    return {
        f"LoRA{note}": engine.contestant(inputs, [plain[n] for n in chosen]),
        f"MoLEx{note}": engine.contestant(inputs, [tenants[n] for n in chosen]),
    }


def compare(setting: Setting, scratch: Path) -> None:
    folder = setting.base(scratch)
    trained = setting.shape == "demo-encoder" and DATA.is_dir()
    contestants: dict[str, Contestant] = {}
    for dtype in DTYPES:
        engine = OwnEngine(folder, dtype)
        arms = random_gates(engine, setting) | (trained_gates(engine, setting) if trained else {})
        contestants |= {f"{name} {dtype}": arm for name, arm in arms.items()}
    medians = measure(contestants, setting.rounds)
    pairs = [("MoLEx", "LoRA"), ("LoRA", "base"), ("MoLEx", "base")]
    if trained:
        pairs.append(("MoLEx, trained gates", "LoRA, trained gates"))
    ratios = {
        f"{over} / {under}, {dtype}": medians[f"{over} {dtype}"] / medians[f"{under} {dtype}"]
        for dtype in DTYPES
        for over, under in pairs
    }
    report(f"{setting.shape}: {setting.requests} sentences, {setting.adapters} adapters", medians, ratios)


if __name__ == "__main__":
    compare_all(__doc__ or "", compare, requests=(128, 512))
