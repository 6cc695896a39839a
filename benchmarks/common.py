"""What every benchmark shares: inputs, contestants of our own, interleaved rounds, medians, ratios."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import RobertaConfig, RobertaModel
from transformers.utils import logging

from benchmarks.facts import facts
from benchmarks.figures import Figure, save
from molex import BARE, MolexModel, Row
from molex.adapter import Adapter, assemble, new_adapter
from molex.backbone import BaseSpec
from molex.config import AdapterConfig, MolexConfig
from molex.layers import StockLayers
from molex.memory import freeze_what_is_loaded, keep_compiled_kernels, keep_freed_memory
from molex.native.weights import Bits
from server.precision import BFLOAT16_FLAGS

PROJECT = Path(__file__).parents[1]
DEMO_ENCODER = PROJECT / ".models" / "e5-small"
SHAPES = ("demo-encoder", "roberta-base-shape")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HAS_BFLOAT16 = any(torch.cpu.get_capabilities().get(flag) for flag in BFLOAT16_FLAGS)
FAST_DTYPES = list(DTYPES) if HAS_BFLOAT16 else ["float32"]
"""Those that this CPU has products of. PyTorch takes several times as long for others."""
OWN_PRECISIONS: dict[str, tuple[torch.dtype, Bits | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16 if HAS_BFLOAT16 else torch.float32, 8),
}
"""What our own engine runs in: the dtype of hidden states and the bits of weights that are rounded."""

Contestant = Callable[[], object]
C = TypeVar("C")


@contextmanager
def base_folder(shape: str) -> Iterator[Path]:
    """The demo encoder, or a random model of RoBERTa-base's shape, which is deleted in the end."""
    logging.disable_progress_bar()
    if shape == "demo-encoder":
        yield DEMO_ENCODER
        return
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        RobertaModel(config, add_pooling_layer=False).save_pretrained(scratch)
        yield Path(scratch)


def random_adapter(
    spec: BaseSpec, seed: int, molex: MolexConfig | None = None, device: torch.device | str = "cpu"
) -> Adapter:
    """A rank-8 adapter on query and value in which all weights are random: as costly as a trained one."""
    targets = ("q_proj", "v_proj") if spec.generates else ("query", "value")
    config = AdapterConfig(
        "CAUSAL_LM" if spec.generates else "SEQ_CLS", r=8, lora_alpha=16, target_modules=targets, molex=molex
    )
    fresh = new_adapter(spec, config, num_labels=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (tensor.detach() + 0.02 * torch.randn(tensor.shape, generator=generator)).to(device)
        for name, tensor in fresh.tensors.items()
    }
    return assemble(config, spec, tensors)


def mixing_everywhere(spec: BaseSpec) -> MolexConfig:
    """MoLEx at every depth, with one shared linear gate."""
    return MolexConfig(mixed_depths=tuple(range(spec.num_layers)))


def sentences(count: int, seed: int) -> list[list[int]]:
    """Token ids in natural sentence lengths: 6 to 60 tokens, most of them near 20."""
    rng = random.Random(seed)
    lengths = [min(60, max(6, round(rng.lognormvariate(3.0, 0.5)))) for _ in range(count)]
    return [[rng.randrange(4, 40_000) for _ in range(length)] for length in lengths]


def zipf(count: int, num_adapters: int, seed: int) -> list[int]:
    """Adapter numbers whose popularity falls as 1 / rank."""
    rng = random.Random(seed)
    return rng.choices(range(num_adapters), [1 / (n + 1) for n in range(num_adapters)], k=count)


class OwnEngine:
    """The engine as the server runs it: one base in one precision, prepacked.

    Without `kernels` PyTorch runs the layers, as it does on a CPU that has not what the kernels need.
    """

    def __init__(self, folder: Path, precision: str, *, kernels: bool = True) -> None:
        dtype, bits = OWN_PRECISIONS[precision]
        self.model = MolexModel.from_pretrained(folder, dtype=dtype)
        if kernels:
            self.model.prepack(bits)
        elif isinstance(layers := self.model.backbone.layers, StockLayers):
            layers.prepack()

    def contestant(self, inputs: Sequence[Sequence[int]], adapters: Sequence[Adapter]) -> Contestant:
        rows = [Row(ids, adapter) for ids, adapter in zip(inputs, adapters, strict=True)]

        def run() -> object:
            with torch.inference_mode():
                return self.model.run(rows)

        return run

    def bare(self, inputs: Sequence[Sequence[int]]) -> Contestant:
        return self.contestant(inputs, [BARE] * len(inputs))


def in_turn(contestants: Sequence[Contestant]) -> Contestant:
    """One contestant that runs several batches, one after another."""

    def run() -> None:
        for contestant in contestants:
            contestant()

    return run


def in_batches(
    contestant: Callable[[Sequence[Sequence[int]], Sequence[C]], Contestant],
    inputs: Sequence[Sequence[int]],
    chosen: Sequence[C],
    size: int,
) -> Contestant:
    """One contestant that runs all inputs; `contestant` makes one batch of some, with their adapters."""
    starts = range(0, len(inputs), size)
    return in_turn([contestant(inputs[i : i + size], chosen[i : i + size]) for i in starts])


def measure(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, float]:
    """Median seconds of each. Every round runs all of them once, in a new order; the first only warms up.

    What is loaded by now is out of garbage collections, for all contestants alike, as it is in the server.
    """
    freeze_what_is_loaded()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    rng = random.Random(0)
    for number in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, medians: Mapping[str, float], ratios: Mapping[str, float]) -> None:
    print(f"\n{title}")
    width = max(28, *(len(name) + 2 for name in medians))
    for name, seconds in medians.items():
        print(f"  {name:<{width}}{seconds * 1e3:10.1f} ms")
    for name, ratio in ratios.items():
        print(f"  {name:<56}{ratio:6.2f} x")


def fastest(medians: Mapping[str, float], names: Sequence[str]) -> str:
    """The contestant with the smallest median."""
    return min(names, key=medians.__getitem__)


def milliseconds(medians: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The medians of some contestants as `Figure.measured` lists them."""
    return {f"{name}, ms": medians[name] * 1e3 for name in names}


def command_line(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks with figures have. Called as the benchmark starts."""
    facts()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, help="folder for the figures; see benchmarks.table")
    return parser


def behave_as_the_server() -> None:
    """Print what is measured on, and set the process up as `molex serve` does."""
    print(facts())
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    keep_freed_memory()
    keep_compiled_kernels()


@dataclass(frozen=True)
class Setting:
    """One comparison: the base, the numbers of requests in a batch, the number of adapters, the rounds."""

    shape: str
    folder: Path
    requests: Sequence[int]
    adapters: int
    rounds: int


def compare_all(
    doc: str | None, script: str, compare: Callable[[Setting], list[Figure]], requests: Sequence[int]
) -> None:
    """Parse the command line, call `compare` for each base and number of adapters, and save the figures."""
    parser = command_line(doc, rounds=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--requests", nargs="+", type=int, default=requests)
    parser.add_argument("--adapters", nargs="+", type=int, default=(1, 8, 32))
    arguments = parser.parse_args()
    behave_as_the_server()
    figures: list[Figure] = []
    for shape in arguments.shapes:
        with base_folder(shape) as folder:
            for adapters in arguments.adapters:
                setting = Setting(shape, folder, arguments.requests, adapters, arguments.rounds)
                figures += compare(setting)
    save(figures, script, arguments.output)
