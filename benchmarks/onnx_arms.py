"""The contestants of bench_onnx: layers on our kernels, and on ONNX Runtime in processes of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from benchmarks.common import Contestant
from benchmarks.peers import answering
from molex import BARE, MolexModel, Row
from molex.depths import NativeDepths
from molex.forward import Forward
from molex.lora import BatchLora, LoraWeights, LowRank
from molex.native import build
from molex.native.weights import Bits
from molex.onnx.sessions import bytes_overflow
from molex.stage import Stage

INPUTS = "inputs.safetensors"
TOKENS = 20
"""Of a request to an encoder, as long as most sentences."""
RANK = 8
LEAST_COSINES = {"float32": 0.999, "bfloat16": 0.99, "8 bits": 0.99, "4 bits": 0.97}
"""Between a row that a contestant makes and that of our float32, on average, by our precisions. Rounding to
4 bits by itself leaves less of queries, keys and values than to 8: 0.985."""
OURS: dict[str, tuple[torch.dtype, Bits | None, Bits | None]] = {
    "float32": (torch.float32, None, None),
    "bfloat16": (torch.bfloat16, None, None),
    "8 bits": (torch.bfloat16, 8, None),
    "4 bits": (torch.bfloat16, 8, 4),
}
"""The dtype of hidden states, the bits of own layers, and those of routed ones, which run where given."""
SPINNING = {"sleep": "0", "spin": "1"}
"""What threads of ONNX Runtime do that wait for work in a pass, and how `benchmarks/onnx_peer.py` is told."""

Array = npt.NDArray[Any]
Layers = Callable[[], list[Tensor]]
"""One pass through all layers; returns what the graph of ONNX Runtime has as outputs."""


def ours(precision: str) -> str:
    return f"ours {precision}"


def theirs(variant: str, waits: str) -> str:
    return f"ONNX Runtime {variant}, threads {waits}"


@dataclass(frozen=True)
class Load:
    """What both sides run on: an adapter, and hidden states [requests, tokens, d] or [rows, d] by name."""

    lora: LoraWeights
    hidden: dict[str, Tensor]

    @classmethod
    def of(cls, model: MolexModel, sizes: dict[str, int]) -> Load:
        """Random updates, and embeddings of random tokens for so many requests or rows."""
        return cls(random_updates(model), {name: embedded(model, size) for name, size in sizes.items()})

    def save(self, model: MolexModel, path: Path) -> None:
        """Write the inputs of the graph."""
        hidden = {name: tensor.numpy() for name, tensor in self.hidden.items()}
        save_file({**hidden, **side_by_side(model, self.lora)}, path)


def random_updates(model: MolexModel) -> LoraWeights:
    """Low-rank updates of query and value in all layers."""
    query, _, value = model.backbone.family.projections
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for layer, module in product(range(model.spec.num_layers), (query, value)):
        inputs, outputs = model.spec.modules[module]
        a, b = (torch.randn(*shape, generator=generator) for shape in ((RANK, inputs), (outputs, RANK)))
        updates[layer, module] = LowRank(0.02 * a, 0.02 * b, scaling=2.0)
    return LoraWeights(updates)


def embedded(model: MolexModel, size: int) -> Tensor:
    shape = (size,) if model.spec.generates else (size, TOKENS)
    ids = torch.randint(4, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(size))
    positions = torch.arange(shape[-1]).expand(shape)
    with torch.inference_mode():
        hidden = model.backbone.embed(ids.flatten(), positions.flatten(), None)
    return hidden.view(*shape, -1)


def side_by_side(model: MolexModel, lora: LoraWeights) -> dict[str, Array]:
    """The factors as the graph has them: `a0` [d, 2r] and `b0` [2r, e] of layer 0, and so on."""
    query, key, value = model.backbone.family.projections
    no_key = torch.zeros(model.spec.modules[key][1], 0)
    arrays = {}
    for layer in range(model.spec.num_layers):
        of_query, of_value = lora.updates[layer, query], lora.updates[layer, value]
        b = torch.block_diag(of_query.b * of_query.scaling, no_key, of_value.b * of_value.scaling).T
        arrays[f"a{layer}"] = torch.cat([of_query.a, of_value.a]).T.contiguous().numpy()
        arrays[f"b{layer}"] = b.contiguous().numpy()
    return arrays


def through_depths(model: MolexModel, lora: LoraWeights, hidden: Tensor) -> Layers:
    """Hidden states [requests, tokens, d] through one layer after another, as in a pass of a server."""
    requests, tokens, _ = hidden.shape
    rows = [Row([0] * tokens, replace(BARE, lora=lora))] * requests
    forward = Forward(rows, [rows[0].adapter], BatchLora([lora]), None, model.backbone, "last")
    depths = NativeDepths(forward, [tokens] * requests)
    x = hidden.flatten(0, 1).to(model.dtype)
    return lambda: [depths.run(x, 0, model.spec.num_layers)]


def through_halves(model: MolexModel, lora: LoraWeights, hidden: Tensor) -> Layers:
    """The same rows [n, d] through both halves of each layer, the second as if attention returned them."""
    count, layers, x = len(hidden), model.backbone.layers, hidden.to(model.dtype)
    rows = np.arange(count)
    stage = Stage(rows, torch.from_numpy(rows), [count], [count], [[(0, 0, count)]], BatchLora([lora]))
    numbers = range(layers.first_routed, layers.first_routed + model.spec.num_layers)

    def run() -> list[Tensor]:
        outputs = []
        for number in numbers:
            outputs.append(layers.project(stage, [number], x))
            outputs += layers.finish(stage, [number], x, x)
        return outputs

    return run


def repeated(layers: Layers, passes: int) -> Contestant:
    def run() -> None:
        with torch.inference_mode():
            for _ in range(passes):
                layers()

    return run


def why_not() -> str | None:
    """Why our kernels do not run; None where they do."""
    return build.why_not(torch.bfloat16, torch.device("cpu"))


class Arms:
    """The contestants of a base, by inputs and by name; all of them make the same of the same inputs."""

    def __init__(self, base: Path, sizes: dict[str, int], passes: int, folder: Path) -> None:
        """`sizes`: requests or rows of the inputs, by their names; a contestant runs `passes` passes.

        `folder` takes what the processes of ONNX Runtime read and write.
        """
        self._base, self._passes, self._folder = base, passes, folder
        model = MolexModel.from_pretrained(base)
        self.num_layers = model.spec.num_layers
        self._load = Load.of(model, sizes)
        self._load.save(model, folder / INPUTS)
        self.contestants: dict[str, dict[str, Contestant]] = {inputs: {} for inputs in sizes}
        self._expected: dict[str, Sequence[Array]] = {}

    def add_ours(self, precision: str) -> None:
        dtype, bits, routed_bits = OURS[precision]
        model = MolexModel.from_pretrained(self._base, dtype=dtype)
        model.prepack(bits, routed_bits)
        through_layers = through_halves if model.spec.generates else through_depths
        for inputs, hidden in self._load.hidden.items():
            layers = through_layers(model, self._load.lora, hidden)
            with torch.inference_mode():
                outputs = [tensor.float().numpy() for tensor in layers()]
            self._add(inputs, precision, ours(precision), outputs, repeated(layers, self._passes))

    def add_theirs(self, stack: ExitStack, precision: str, variant: str, waits: str) -> None:
        """ONNX Runtime in a variant of a precision of ours; its process runs until `stack` closes.

        Raises PeerError.
        """
        name = theirs(variant, waits)
        made = self._folder / f"{name}.safetensors"
        command = [sys.executable, "-m", "benchmarks.onnx_peer", str(self._base)]
        command += [str(self._folder / INPUTS), str(made), variant]
        command += [SPINNING[waits], str(int(bytes_overflow()))]
        ask = stack.enter_context(answering(command, self._folder / f"{name}.log"))
        arrays = load_file(made)
        for inputs in self.contestants:
            count = sum(key.startswith(f"{inputs}/") for key in arrays)
            outputs = [arrays[f"{inputs}/{place}"] for place in range(count)]
            request = json.dumps({"inputs": inputs, "passes": self._passes})
            self._add(inputs, precision, name, outputs, partial(ask, request))

    def _add(
        self, inputs: str, precision: str, name: str, outputs: Sequence[Array], contestant: Contestant
    ) -> None:
        """Raises ValueError where a contestant makes something else than our float32, which comes first."""
        expected = self._expected.setdefault(inputs, outputs)
        rows = np.concatenate([cosines(*pair) for pair in zip(outputs, expected, strict=True)])
        print(f"{inputs}, {name}: cosine with our float32 {rows.mean():.5f}, lowest {rows.min():.5f}")
        if not rows.mean() >= LEAST_COSINES[precision]:
            raise ValueError(f"{name} makes something else of {inputs}: cosine {rows.mean():.5f}")
        self.contestants[inputs][name] = contestant


def cosines(one: Array, other: Array) -> Array:
    """Of each row with the row in its place."""
    one, other = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (one, other))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    result: Array = (one * other).sum(axis=1) / lengths
    return result
