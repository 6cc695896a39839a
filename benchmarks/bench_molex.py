"""What MoLEx costs: a packed batch of MoLEx adapters against one of LoRA adapters and the bare base.

    python -m benchmarks.bench_molex [--rounds 7] [--shapes …] [--requests …] [--adapters …]

An exact MoLEx forward runs up to two layers at each depth. Every depth is mixed and the gates are random, so
the requests of a batch spread over all layers: the worst case for grouping. The demo encoder runs trained
gates as well: its tenants are copies of the example adapters, half of SST-2 and half of TREC, and their texts
come from the test files of both in ../shared/data. The LoRA arm has the same low-rank updates and no gates.

The figure is MoLEx over LoRA with 32 adapters, in the precision that MoLEx is fastest in.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.common import (
    DEMO_ENCODER,
    FAST_DTYPES,
    PROJECT,
    Contestant,
    OwnEngine,
    Setting,
    compare_all,
    fastest,
    measure,
    milliseconds,
    mixing_everywhere,
    random_adapter,
    report,
    sentences,
    zipf,
)
from benchmarks.figures import Figure
from molex import Adapter, read_adapter
from molex.tokenizer import load_tokenizer
from molex.train.data import read_labelled

DATA = PROJECT.parent / "shared" / "data"
TRAINED = ("sst2", "trec")
TRAINED_NOTE = ", trained gates"
REQUESTS = (128, 512)
HELD_ADAPTERS = 32
BOUND = 2.1
KEY = "MoLEx"


def without_gates(adapter: Adapter) -> Adapter:
    """The LoRA adapter inside a MoLEx adapter."""
    return replace(adapter, config=replace(adapter.config, molex=None), gates={})


def random_gates(engine: OwnEngine, requests: int, adapters: int) -> dict[str, Contestant]:
    """Random adapters on random tokens, with and without gates, and the bare base."""
    spec = engine.model.spec
    inputs = sentences(requests, seed=1)
    chosen = zipf(requests, adapters, seed=2)
    mixture = mixing_everywhere(spec)
    tenants = [random_adapter(spec, seed=n, molex=mixture) for n in range(adapters)]
    return {"base": engine.bare(inputs)} | both_kinds(engine, inputs, tenants, chosen, "")


def trained_gates(engine: OwnEngine, requests: int, adapters: int) -> dict[str, Contestant]:
    """Copies of the example adapters on the texts that they were trained for."""
    model, rng = engine.model, random.Random(1)
    tokenizer = load_tokenizer(DEMO_ENCODER, model.spec)
    texts = {task: read_labelled(DATA / task / "test.tsv").examples for task in TRAINED}
    tasks = [TRAINED[n % 2] for n in range(adapters)]
    folders = [PROJECT / "examples" / "adapters" / f"{task}-molex" for task in tasks]
    tenants = [read_adapter(folder, model.spec, model.dtype, model.device) for folder in folders]
    chosen = zipf(requests, adapters, seed=2)
    inputs = [tokenizer(rng.choice(texts[tasks[n]]).text)["input_ids"] for n in chosen]
    return both_kinds(engine, inputs, tenants, chosen, TRAINED_NOTE)


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


def compare(setting: Setting) -> list[Figure]:
    engines = {dtype: OwnEngine(setting.folder, dtype) for dtype in FAST_DTYPES}
    return [figure for count in setting.requests for figure in compare_batch(setting, engines, count)]


def compare_batch(setting: Setting, engines: Mapping[str, OwnEngine], requests: int) -> list[Figure]:
    """Everything on one batch of so many requests."""
    notes = [""]
    contestants: dict[str, Contestant] = {}
    for dtype, engine in engines.items():
        arms = random_gates(engine, requests, setting.adapters)
        if setting.shape == "demo-encoder" and DATA.is_dir():
            notes = ["", TRAINED_NOTE]
            arms |= trained_gates(engine, requests, setting.adapters)
        contestants |= {f"{name} {dtype}": arm for name, arm in arms.items()}
    medians = measure(contestants, setting.rounds)
    pairs = [(f"MoLEx{note}", f"LoRA{note}") for note in notes] + [("LoRA", "base"), ("MoLEx", "base")]
    ratios = {
        f"{over} / {under}, {dtype}": medians[f"{over} {dtype}"] / medians[f"{under} {dtype}"]
        for dtype in FAST_DTYPES
        for over, under in pairs
    }
    title = f"{setting.shape}: {requests} sentences, {setting.adapters} adapters"
    report(title, medians, ratios)
    if setting.adapters != HELD_ADAPTERS:
        return []
    return [figure_of(f"{note or ', random gates'}, {title}", note, medians) for note in notes]


def figure_of(what: str, note: str, medians: Mapping[str, float]) -> Figure:
    """MoLEx over LoRA in the precision that MoLEx is fastest in."""
    name = fastest(medians, [f"MoLEx{note} {dtype}" for dtype in FAST_DTYPES])
    pair = [name, name.replace("MoLEx", "LoRA")]
    ratio = medians[pair[0]] / medians[pair[1]]
    measured = milliseconds(medians, pair)
    return Figure(KEY, f"MoLEx / LoRA{what}", ratio, BOUND, at_least=False, unit="x", measured=measured)


if __name__ == "__main__":
    compare_all(__doc__, "bench_molex", compare, REQUESTS)
