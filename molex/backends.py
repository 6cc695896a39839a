"""What runs the layers of a base: the kernels, grouped products on a GPU, ONNX Runtime, or PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch

from molex.errors import BaseModelError
from molex.exported import Exported, read_layers, read_vocabulary
from molex.family import Family
from molex.grouped.layers import GroupedLayers, can_group
from molex.layers import Layers, StockLayers, run_once
from molex.native import build
from molex.native.layers import ACTIVATIONS, NativeLayers, release, why_not_natively
from molex.native.weights import Bits

Backend = Literal["auto", "torch", "kernels", "onnx"]
"""What is to run the layers."""
MISSING = "is not installed: pip install 'molex-serve[onnx]'"
Halves = tuple[bytes, bytes]
ROWS, CALLS = 32, 15
"""What is measured to choose between ONNX Runtime and PyTorch: layers on the tokens of a sentence or two."""


@dataclass(frozen=True)
class Wanted:
    """The layers of a base as they were loaded, and the bits that weights are to have, if any.

    `routed_bits` are those of the routed branch.
    """

    stock: StockLayers
    family: Family
    config: Any
    bits: Bits | None = None
    routed_bits: Bits | None = None

    @property
    def fewest(self) -> Bits | None:
        return 4 if 4 in (self.bits, self.routed_bits) else self.bits or self.routed_bits

    @property
    def activation(self) -> str:
        return str(getattr(self.config, self.family.activation))


def lay_out(wanted: Wanted, backend: Backend) -> tuple[Layers, str]:
    """The layers, laid out for inference, and in words what runs them, and why.

    They take over the weights of the stock layers. Raises BaseModelError where the backend cannot run them.
    """
    if backend == "onnx":
        return _on_onnx(wanted), "ONNX Runtime"
    why_not: str | None = "are not used with the backend torch"
    if backend != "torch":
        why_not = why_not_natively(wanted.stock, wanted.family, wanted.config)
    if why_not is None:
        return _on_kernels(wanted), f"the kernels, as this CPU has {build.instructions()}"
    if wanted.fewest is not None:
        return _in_few_bits(wanted, backend, why_not)
    if backend == "kernels":
        raise BaseModelError(f"the kernels cannot run the layers: they {why_not}")
    if backend == "auto" and can_group(wanted.stock):
        layers = GroupedLayers(wanted.stock, wanted.family, wanted.config)
        release(wanted.stock.blocks)
        return layers, "grouped products"
    if backend == "auto" and why_not_on_onnx(wanted) is None:
        return _faster(wanted, why_not)
    wanted.stock.prepack()
    return wanted.stock, f"PyTorch: the kernels {why_not}"


def why_not_on_onnx(wanted: Wanted) -> str | None:
    """Why ONNX Runtime cannot run layers; None where it can."""
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return f"it {MISSING}"
    if next(wanted.stock.blocks[0].parameters()).device.type != "cpu":
        return "it runs on CPUs alone"
    if set(wanted.stock.dtypes) != {torch.float32}:
        return "it computes in float32 alone"
    if wanted.activation not in ACTIVATIONS:
        return f"it does not know the function {wanted.activation}"
    return None


def _on_kernels(wanted: Wanted) -> Layers:
    layers = NativeLayers(wanted.stock, wanted.family, wanted.config, wanted.bits, wanted.routed_bits)
    release(wanted.stock.blocks)
    return layers


def _on_onnx(wanted: Wanted) -> Layers:
    layers = _onnx_layers(wanted)
    release(wanted.stock.blocks)
    return layers


def _onnx_layers(wanted: Wanted) -> Layers:
    """A copy of the layers. Raises BaseModelError where ONNX Runtime cannot run them."""
    layers, vocabulary = graphs_of(wanted)
    return _loaded(layers, wanted.stock.num_layers, vocabulary)


def graphs_of(wanted: Wanted) -> tuple[Iterator[Halves], bytes | None]:
    """Layers, those of the routed branch behind the others if they differ, and a decoder's vocabulary.

    Raises BaseModelError where ONNX Runtime cannot run them.
    """
    if (problem := why_not_on_onnx(wanted)) is not None:
        raise BaseModelError(f"ONNX Runtime cannot run the layers: {problem}")
    from molex.onnx.graphs import layer_graphs, vocabulary_graph  # noqa: PLC0415 (optional dependency)

    stock = wanted.stock
    blocks = stock.blocks[: stock.num_layers]
    layers = layer_graphs(blocks, wanted.family, wanted.activation, wanted.bits, wanted.routed_bits)
    return layers, vocabulary_graph(wanted.family, wanted.config)


def load_exported(folder: Path, about: Exported, num_layers: int) -> Layers:
    """The layers of an exported base. Raises BaseModelError where they cannot be loaded."""
    if find_spec("onnxruntime") is None:
        raise BaseModelError(f"base model {str(folder)!r} was exported for ONNX Runtime, which {MISSING}")
    return _loaded(read_layers(folder, about, num_layers), num_layers, read_vocabulary(folder, about))


def _loaded(layers: Iterable[Halves], num_layers: int, vocabulary: bytes | None) -> Layers:
    from molex.onnx.layers import OnnxLayers  # noqa: PLC0415 (optional dependency)

    return OnnxLayers(layers, num_layers, vocabulary)


def _in_few_bits(wanted: Wanted, backend: Backend, why_not: str) -> tuple[Layers, str]:
    problem = why_not_on_onnx(wanted)
    if backend == "auto" and problem is None:
        return _on_onnx(wanted), f"ONNX Runtime: the kernels {why_not}"
    message = f"{wanted.fewest}-bit weights need the kernels, which {why_not}"
    raise BaseModelError(message if backend != "auto" else f"{message}, or ONNX Runtime: {problem}")


def _faster(wanted: Wanted, why_not: str) -> tuple[Layers, str]:
    """ONNX Runtime or PyTorch. Both have the weights for a moment."""
    on_onnx = _onnx_layers(wanted)
    wanted.stock.prepack()
    there, here = milliseconds([on_onnx, wanted.stock], wanted)
    took = f"a layer takes it {{:.2f}} ms for {ROWS} tokens, {{}} {{:.2f}}; the kernels {why_not}"
    if there < here:
        release(wanted.stock.blocks)
        return on_onnx, "ONNX Runtime: " + took.format(there, "PyTorch", here)
    return wanted.stock, "PyTorch: " + took.format(here, "ONNX Runtime", there)


def milliseconds(contestants: Sequence[Layers], wanted: Wanted) -> list[float]:
    """How long both halves of the first layer take, at the median, in turns; the first is not counted."""
    width, hidden_size = wanted.stock.modules[wanted.family.join]
    taken: list[list[float]] = [[] for _ in contestants]
    for layers, times in list(zip(contestants, taken, strict=True)) * CALLS:
        started = perf_counter()
        run_once(layers, 0, ROWS, hidden_size, width, torch.device("cpu"))
        times.append(perf_counter() - started)
    return [1000 * median(times[1:]) for times in taken]
