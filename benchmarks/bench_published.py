"""MoLEx classification: this engine against the published way of running it (benchmarks/published.py).

    python -m benchmarks.bench_published [--rounds 9] [--requests 32 128] [--adapters 1 32]

The same sentences of 6 to 60 tokens go through the demo encoder. The published way takes one adapter a
process; with several, whose popularity falls by Zipf's law, it runs one padded batch for each adapter and
gets the exchange of adapters for nothing. Ours runs one packed batch. Every depth is mixed and the gates are
random, which spreads our requests over all layers: our worst case.

The two do not compute the same numbers: the published batch votes as a whole, ours by request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.common import (
    DEMO_ENCODER,
    OWN_PRECISIONS,
    Contestant,
    OwnEngine,
    behave_as_the_server,
    command_line,
    fastest,
    in_turn,
    measure,
    milliseconds,
    mixing_everywhere,
    random_adapter,
    report,
    sentences,
    zipf,
)
from benchmarks.figures import Figure, save
from benchmarks.published import PublishedModel
from molex.adapter import Adapter

PUBLISHED = "published float32"
BOUND = 4


def by_adapter(
    model: PublishedModel, inputs: Sequence[Sequence[int]], adapters: Sequence[Adapter]
) -> Contestant:
    """One padded batch for each of the distinct adapters of the requests."""

    def batch(adapter: Adapter) -> Contestant:
        padded = model.pad([ids for ids, own in zip(inputs, adapters, strict=True) if own is adapter])

        def run() -> object:
            model.use(adapter)
            return model(padded)

        return run

    return in_turn([batch(adapter) for adapter in {id(own): own for own in adapters}.values()])


def compare(
    model: PublishedModel,
    engines: Mapping[str, OwnEngine],
    tenants: Sequence[Adapter],
    requests: int,
    rounds: int,
) -> list[Figure]:
    inputs = sentences(requests, seed=1)
    chosen = [tenants[n] for n in zipf(requests, len(tenants), seed=2)]
    contestants = {PUBLISHED: by_adapter(model, inputs, chosen)}
    ours = {precision: f"ours {precision}" for precision in engines}
    contestants |= {ours[name]: engine.contestant(inputs, chosen) for name, engine in engines.items()}
    medians = measure(contestants, rounds)
    distinct = len({id(adapter) for adapter in chosen})
    setting = f"demo encoder, {requests} sentences, {distinct} of {len(tenants)} adapters"
    ratios = {name: medians[PUBLISHED] / medians[name] for name in ours.values()}
    report(setting, medians, {f"published / {name}": ratio for name, ratio in ratios.items()})
    best = fastest(medians, list(ours.values()))
    return [
        Figure(
            "P4",
            f"published / ours in {arm}, {setting}",
            ratios[name],
            BOUND if name == best else None,
            at_least=True,
            unit="x",
            measured=milliseconds(medians, [PUBLISHED, name]),
        )
        for arm, name in {
            "its best precision": best,
            "bfloat16": ours["bfloat16"],
            "float32": ours["float32"],
        }.items()
    ]


def main() -> None:
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--requests", nargs="+", type=int, default=(32, 128))
    parser.add_argument("--adapters", nargs="+", type=int, default=(1, 32))
    arguments = parser.parse_args()
    behave_as_the_server()
    model = PublishedModel(DEMO_ENCODER)
    engines = {precision: OwnEngine(DEMO_ENCODER, precision) for precision in OWN_PRECISIONS}
    spec = next(iter(engines.values())).model.spec
    tenants = [random_adapter(spec, n, mixing_everywhere(spec)) for n in range(max(arguments.adapters))]
    figures = [
        figure
        for count in arguments.adapters
        for requests in arguments.requests
        for figure in compare(model, engines, tenants[:count], requests, arguments.rounds)
    ]
    save(figures, "bench_published", arguments.output)


if __name__ == "__main__":
    main()
