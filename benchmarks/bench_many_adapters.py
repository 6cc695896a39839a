"""What many registered adapters cost: throughput with 2,000 of them against 5.

    python -m benchmarks.bench_many_adapters [--rounds 9] [--many 2000] [--few 5] [--batch 64] [--batches 8]

The popularity of adapters falls by Zipf's law in both arms, the texts are the same, and each round draws
anew which adapters are asked for. All adapters are random rank-8 MoLEx adapters that mix every depth.

All loaded adapters stay in memory: there is no eviction yet, so both arms have every adapter resident. This
measures what a batch of more different adapters, and weights that no cache of the CPU holds, cost; not what
it costs to bring an adapter back. On the demo encoder one adapter takes 1.2 MB in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

from benchmarks.common import (
    DEMO_ENCODER,
    DTYPES,
    Contestant,
    OwnEngine,
    behave_as_the_server,
    command_line,
    fastest,
    measure,
    mixing_everywhere,
    random_adapter,
    report,
    sentences,
    zipf,
)
from benchmarks.figures import Figure, save
from molex.adapter import Adapter

BOUND = 0.97


def stream(engine: OwnEngine, adapters: Sequence[Adapter], batch: int, batches: int) -> Contestant:
    """The same sentences in every round, with adapters drawn anew."""
    inputs = sentences(batch * batches, seed=1)
    rounds = count()

    def run() -> None:
        chosen = zipf(len(inputs), len(adapters), seed=next(rounds))
        for start in range(0, len(inputs), batch):
            part = slice(start, start + batch)
            engine.contestant(inputs[part], [adapters[n] for n in chosen[part]])()

    return run


def figures_of(many: int, few: int, texts: int, medians: Mapping[str, float]) -> list[Figure]:
    """One figure for each precision; the one in which the engine is fastest is held to the bound."""
    measured = {f"{name}, texts/s": texts / seconds for name, seconds in medians.items()}
    best = fastest(medians, [arm_name(few, dtype) for dtype in DTYPES])
    return [
        Figure(
            "P8",
            f"throughput with {many} adapters / {few}, {dtype}",
            medians[arm_name(few, dtype)] / medians[arm_name(many, dtype)],
            BOUND if arm_name(few, dtype) == best else None,
            at_least=True,
            unit="x",
            measured=measured,
        )
        for dtype in DTYPES
    ]


def arm_name(adapters: int, dtype: str) -> str:
    return f"{adapters} adapters {dtype}"


def main() -> None:
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--many", type=int, default=2000)
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8)
    arguments = parser.parse_args()
    many, few, batch, batches = arguments.many, arguments.few, arguments.batch, arguments.batches
    behave_as_the_server()
    engines = {dtype: OwnEngine(DEMO_ENCODER, dtype) for dtype in DTYPES}
    spec = next(iter(engines.values())).model.spec
    adapters = [random_adapter(spec, seed, mixing_everywhere(spec)) for seed in range(max(many, few))]
    contestants = {
        arm_name(number, dtype): stream(engine, adapters[:number], batch, batches)
        for dtype, engine in engines.items()
        for number in (many, few)
    }
    medians = measure(contestants, arguments.rounds)
    figures = figures_of(many, few, batch * batches, medians)
    title = f"demo encoder: {batch * batches} sentences in batches of {batch}"
    report(title, medians, {figure.what: figure.value for figure in figures})
    save(figures, "bench_many_adapters", arguments.output)


if __name__ == "__main__":
    main()
