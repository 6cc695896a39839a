"""A base on one backend in a process of its own, as a contestant of bench_backends.

    python -m benchmarks.backend_arm BASE BACKEND PRECISION

It loads the base, prints a line, and answers every line of its standard input with one of its own when that
is done. A line is a kind of adapter, `lora` or `molex`, and a number of requests: an encoder classifies so
many sentences in one batch, for 8 adapters in turn; a decoder continues as many by 16 tokens for one.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path

import torch
from transformers.utils import logging

# First of all: it tells OpenMP how long threads wait in the server, before PyTorch loads it.
import server  # noqa: F401
from benchmarks.common import Contestant, mixing_everywhere, random_adapter, sentences
from molex import MolexModel, Row
from molex.backends import Backend
from molex.generate import generate
from molex.memory import keep_compiled_kernels, keep_freed_memory
from molex.native.threads import spread_threads
from molex.native.weights import Bits
from molex.sampling import SamplingParams

ADAPTERS = 8
CONTINUATION = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
PRECISIONS: dict[str, tuple[torch.dtype, Bits | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.float32, 8),
    "int4": (torch.float32, 4),
}


class Arm:
    def __init__(self, base: Path, backend: Backend, precision: str) -> None:
        dtype, bits = PRECISIONS[precision]
        self._model = MolexModel.from_pretrained(base, dtype)
        self._model.prepack(bits, backend=backend)
        if self._model.on_kernels:
            spread_threads()

    @cache  # noqa: B019 (it lives as long as the process)
    def contestant(self, kind: str, count: int) -> Contestant:
        spec = self._model.spec
        molex = mixing_everywhere(spec) if kind == "molex" else None
        texts = sentences(count, seed=count)
        if spec.generates:
            adapter = random_adapter(spec, seed=0, molex=molex)
            return partial(generate, self._model, texts, adapter, CONTINUATION)
        adapters = [random_adapter(spec, seed=n, molex=molex) for n in range(ADAPTERS)]
        rows = [Row(text, adapters[n % ADAPTERS]) for n, text in enumerate(texts)]
        return partial(self._model.run, rows)


def main() -> None:
    base, backend, precision = sys.argv[1:]
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    keep_freed_memory()
    keep_compiled_kernels()
    arm = Arm(Path(base), backend, precision)  # type: ignore[arg-type]
    print("ready", flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        with torch.inference_mode():
            arm.contestant(kind, int(count))()
        print("done", flush=True)


if __name__ == "__main__":
    main()
