"""How much of the CPU's matrix rate a served forward pass reaches.

    python -m benchmarks.bench_matrix_rate [--rounds 9] [--shapes …] [--requests 128] [--adapters 32]

The rate of a pass is the operations of its linear layers, attention and low-rank updates, counted from shapes
(benchmarks/flops.py), over its time. The matrix rate is the best of two large plain products (`torch.mm`) and
of the base's own prepacked linear layers on 2,048 rows, in the same precision, interleaved with the passes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from benchmarks.bench_molex import without_gates
from benchmarks.common import (
    DTYPES,
    FAST_DTYPES,
    SHAPES,
    Contestant,
    OwnEngine,
    base_folder,
    behave_as_the_server,
    command_line,
    measure,
    mixing_everywhere,
    random_adapter,
    report,
    sentences,
    zipf,
)
from benchmarks.figures import Figure, save
from benchmarks.flops import Work, forward_flops, product_flops
from molex import Adapter, Row
from molex.backbone import BaseSpec
from molex.prepack import PrepackedLinear, can_prepack

LARGE = ((2048, 2048, 2048), (4096, 1024, 4096))
PREPACKED_ROWS = 2048
MIN_TOKENS = 512
BOUND = 0.7

Counted = tuple[Contestant, int]
"""A contestant and the operations of one run of it."""


def products(spec: BaseSpec, dtype: str) -> dict[str, Counted]:
    """Plain products, and the base's linear layers with prepacked weights where the CPU has those."""
    made: dict[str, Counted] = {}
    for rows, inputs, outputs in LARGE:
        a, b = (torch.randn(shape).to(DTYPES[dtype]) for shape in ((rows, inputs), (inputs, outputs)))
        name = f"mm {rows} × {inputs} × {outputs} {dtype}"
        made[name] = partial(a.mm, b), product_flops(rows, inputs, outputs)
    if not can_prepack(DTYPES[dtype], torch.device("cpu")):
        return made
    for inputs, outputs in sorted(set(spec.modules.values())):
        plain = nn.Linear(inputs, outputs, dtype=DTYPES[dtype]).requires_grad_(False)
        x = torch.randn(PREPACKED_ROWS, inputs).to(DTYPES[dtype])
        name = f"prepacked {PREPACKED_ROWS} × {inputs} × {outputs} {dtype}"
        flops = product_flops(PREPACKED_ROWS, inputs, outputs)
        made[name] = partial(PrepackedLinear(plain), x), flops
    return made


def served(engine: OwnEngine, requests: int, count: int, dtype: str) -> dict[str, Counted]:
    """A batch of LoRA adapters and one of MoLEx adapters, all random."""
    spec = engine.model.spec
    mixing = [random_adapter(spec, seed=n, molex=mixing_everywhere(spec)) for n in range(count)]
    kinds = {"LoRA": [without_gates(adapter) for adapter in mixing], "MoLEx": mixing}
    inputs, chosen = sentences(requests, seed=1), zipf(requests, count, seed=2)
    passes: dict[str, Counted] = {}
    for kind, tenants in kinds.items():
        adapters = [tenants[n] for n in chosen]
        flops = forward_flops(spec, _work(engine, inputs, adapters))
        passes[f"{kind} {dtype}"] = engine.contestant(inputs, adapters), flops
    return passes


def _work(engine: OwnEngine, inputs: Sequence[Sequence[int]], adapters: Sequence[Adapter]) -> list[Work]:
    rows = [Row(ids, adapter) for ids, adapter in zip(inputs, adapters, strict=True)]
    with torch.inference_mode():
        routes = engine.model.run(rows).routes
    return [Work(len(row.token_ids), row.adapter, route) for row, route in zip(rows, routes, strict=True)]


def compare(shape: str, requests: int, count: int, rounds: int) -> list[Figure]:
    passes: dict[str, dict[str, Counted]] = {}
    yardsticks: dict[str, dict[str, Counted]] = {}
    with base_folder(shape) as folder:
        for dtype in FAST_DTYPES:
            engine = OwnEngine(folder, dtype)
            passes[dtype] = served(engine, requests, count, dtype)
            yardsticks[dtype] = products(engine.model.spec, dtype)
    every = {name: run for by in (*passes.values(), *yardsticks.values()) for name, run in by.items()}
    with torch.inference_mode():
        medians = measure({name: run for name, (run, _) in every.items()}, rounds)
    rates = {name: flops / medians[name] / 1e9 for name, (_, flops) in every.items()}
    tokens = sum(map(len, sentences(requests, seed=1)))
    setting = f"{shape}, {requests} sentences, {tokens} tokens, {count} adapters"
    figures = [
        figure_of(
            f"packed pass of {name}, {setting}", name, max(yardsticks[dtype], key=rates.__getitem__), rates
        )
        for dtype in FAST_DTYPES
        for name in passes[dtype]
    ]
    report(setting, medians, {figure.what: figure.value for figure in figures})
    return figures


def figure_of(what: str, name: str, yardstick: str, rates: Mapping[str, float]) -> Figure:
    measured = {f"{each}, GFLOP/s": rates[each] for each in (name, yardstick)}
    value = rates[name] / rates[yardstick]
    return Figure("P10", what, value, BOUND, at_least=True, unit="of the matrix rate", measured=measured)


def main() -> None:
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--adapters", type=int, default=32)
    arguments = parser.parse_args()
    if (tokens := sum(map(len, sentences(arguments.requests, seed=1)))) < MIN_TOKENS:
        sys.exit(
            f"--requests {arguments.requests}: {tokens} tokens, but the figure is for {MIN_TOKENS} or more"
        )
    behave_as_the_server()
    figures = [
        figure
        for shape in arguments.shapes
        for figure in compare(shape, arguments.requests, arguments.adapters, arguments.rounds)
    ]
    save(figures, "bench_matrix_rate", arguments.output)


if __name__ == "__main__":
    main()
