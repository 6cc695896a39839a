"""Batches on the backends that a CPU has: PyTorch, ONNX Runtime, and the kernels.

    python -m benchmarks.bench_backends [--rounds 7] [--bases encoder decoder] [--output DIR]

Every backend runs the same requests in a process of its own (`benchmarks/backend_arm.py`), in turns: the demo
encoder classifies 1 or 32 sentences, the demo decoder continues 1 or 16 by 16 tokens. A figure is the time
that PyTorch takes in float32 over that of the contestant. Threads sleep while another process computes.

Where the kernels cannot run they are left out, and the figures say what `--backend auto` chooses between.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

from benchmarks.common import DEMO_ENCODER, PROJECT, Contestant, command_line, measure, report
from benchmarks.facts import facts
from benchmarks.figures import Figure, save
from benchmarks.peers import answering
from molex.native import build

ROUNDS = 7
KINDS = ("lora", "molex")
YARDSTICK = ("torch", "fp32")
ARMS = (YARDSTICK, ("torch", "bf16"), ("onnx", "fp32"), ("onnx", "int8"), ("onnx", "int4"))
OF_KERNELS = (("kernels", "fp32"), ("kernels", "bf16"), ("kernels", "int8"))


@dataclass(frozen=True)
class Base:
    folder: Path
    what: str
    counts: tuple[int, ...]


BASES = {
    "encoder": Base(DEMO_ENCODER, "classify {}", (1, 32)),
    "decoder": Base(PROJECT / ".models" / "smollm2-135m-instruct", "continue {}", (1, 16)),
}


def arms() -> list[tuple[str, str]]:
    """The backends and their precisions that run here."""
    on_kernels = build.why_not(torch.bfloat16, torch.device("cpu")) is None
    return [*ARMS, *(OF_KERNELS if on_kernels else ())]


def compare(base: Base, rounds: int) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        asks = {}
        for arm in arms():
            command = [sys.executable, "-m", "benchmarks.backend_arm", str(base.folder), *arm]
            asks[" ".join(arm)] = stack.enter_context(
                answering(command, Path(folder) / f"{'-'.join(arm)}.log")
            )
        for kind, count in product(KINDS, base.counts):
            contestants: dict[str, Contestant] = {
                name: partial(ask, f"{kind} {count}") for name, ask in asks.items()
            }
            medians = measure(contestants, rounds)
            found = figures_of(f"{base.what.format(count)}, {kind}", medians)
            report(f"{base.what.format(count)}, {kind}", medians, {each.what: each.value for each in found})
            figures += found
    return figures


def figures_of(title: str, medians: Mapping[str, float]) -> list[Figure]:
    yardstick = " ".join(YARDSTICK)
    return [
        Figure(
            "backends",
            f"{yardstick} / {name}, {title}",
            medians[yardstick] / seconds,
            bound=None,
            at_least=True,
            unit="x",
            measured={f"{arm}, ms": medians[arm] * 1e3 for arm in (yardstick, name)},
        )
        for name, seconds in medians.items()
        if name != yardstick
    ]


def main() -> None:
    parser = command_line(__doc__, ROUNDS)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    options = parser.parse_args()
    print(facts())
    figures = [figure for name in options.bases for figure in compare(BASES[name], options.rounds)]
    save(figures, "bench_backends", options.output, {"onnxruntime": version("onnxruntime")})


if __name__ == "__main__":
    main()
