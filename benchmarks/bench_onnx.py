"""Layers on our kernels against the same layers on ONNX Runtime.

    python -m benchmarks.bench_onnx [--rounds 15] [--bases encoder decoder] [--output DIR]

The demo encoder runs 1, 8 or 32 requests of 20 tokens through all its layers one after another, attention
included. Of the demo decoder each layer runs on the same 1, 4 or 16 rows, all but its attention, which would
need keys and values that ONNX Runtime shares with us. So weights come from memory or caches as in a pass of a
server, and no embedding, vocabulary or head is counted. All rows have one adapter of rank 8 on query and
value.

Ours runs the encoder in one call, as a server does, and the decoder in two calls a layer from Python. ONNX
Runtime has all layers in one graph (`benchmarks/onnx_graphs.py`), with inputs and outputs bound, and one
process for each arm. Its threads look for work before they sleep, or sleep at once; its 8 bits are those of
`quantize_dynamic` or those of MatMulNBits; in each comparison the fastest counts. Its CPU provider multiplies
no bfloat16 on x86: our bfloat16 meets its float32, and the fastest of all its arms. What an arm makes of the
inputs is compared with what our float32 makes of them before anything is measured.

While one side computes, the threads of the other sleep.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path

# First of all: it tells OpenMP how long threads wait in the server, before PyTorch loads it.
import server  # noqa: F401
from benchmarks.common import (
    DEMO_ENCODER,
    PROJECT,
    behave_as_the_server,
    command_line,
    fastest,
    measure,
    report,
)
from benchmarks.figures import Figure, save
from benchmarks.onnx_arms import SPINNING, TOKENS, Arms, ours, theirs, why_not

ROUNDS = 15
PACKAGES = ("onnxruntime", "onnx")
THEIRS = {
    "float32": ("float32",),
    "8 bits": ("int8", "8 bits in blocks"),
    "4 bits": ("4 bits in blocks",),
}
"""Precisions of `benchmarks/onnx_peer.py`, by that of ours that they are compared with."""


@dataclass(frozen=True)
class Base:
    """What is measured of a base model: our precisions, and inputs by name with their requests or rows.

    A contestant runs several `passes` at a time, so that starting weighs little.
    """

    folder: Path
    precisions: Sequence[str]
    sizes: Mapping[str, int]
    passes: int


BASES = {
    "encoder": Base(
        DEMO_ENCODER,
        ("float32", "bfloat16", "8 bits"),
        {f"{size} x {TOKENS} tokens": size for size in (1, 8, 32)},
        passes=3,
    ),
    "decoder": Base(
        PROJECT / ".models" / "smollm2-135m-instruct",
        ("float32", "bfloat16", "8 bits", "4 bits"),
        {"1 row": 1, "4 rows": 4, "16 rows": 16},
        passes=10,
    ),
}


def opponents(base: Base, precision: str) -> dict[str, list[str]]:
    """What one of our precisions is compared with: the arms by what they are called together."""
    arms = {
        known: [theirs(variant, waits) for variant in THEIRS[known] for waits in SPINNING]
        for known in base.precisions
        if known in THEIRS
    }
    if precision in arms:
        return {precision: arms[precision]}
    return {"float32": arms["float32"], "its fastest precision": list(chain(*arms.values()))}


def compare(name: str, base: Base, rounds: int) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arms = Arms(base.folder, dict(base.sizes), base.passes, Path(folder))
        for precision in base.precisions:
            arms.add_ours(precision)
            for variant, waits in product(THEIRS.get(precision, ()), SPINNING):
                arms.add_theirs(stack, precision, variant, waits)
        for inputs, contestants in arms.contestants.items():
            medians = measure(contestants, rounds)
            found = figures_of(f"{name}, {inputs}", base, arms.num_layers, medians)
            report(f"{name}, {inputs}", medians, {figure.what: figure.value for figure in found})
            figures += found
    return figures


def figures_of(title: str, base: Base, num_layers: int, medians: Mapping[str, float]) -> list[Figure]:
    figures = []
    for precision in base.precisions:
        own = ours(precision)
        for label, names in opponents(base, precision).items():
            best = fastest(medians, names)
            microseconds = {
                f"{arm}, µs a layer": medians[arm] / base.passes / num_layers * 1e6 for arm in (own, best)
            }
            figures.append(
                Figure(
                    "layers",
                    f"ONNX Runtime in {label} / ours in {precision}, {title}",
                    medians[best] / medians[own],
                    bound=None,
                    at_least=True,
                    unit="x",
                    measured=microseconds,
                )
            )
    return figures


def main() -> None:
    parser = command_line(__doc__, ROUNDS)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    options = parser.parse_args()
    behave_as_the_server()
    if (reason := why_not()) is not None:
        sys.exit(f"there is nothing to compare: our kernels {reason}")
    figures = [figure for name in options.bases for figure in compare(name, BASES[name], options.rounds)]
    save(figures, "bench_onnx", options.output, {name: version(name) for name in PACKAGES})


if __name__ == "__main__":
    main()
