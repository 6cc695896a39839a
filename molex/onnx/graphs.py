"""The two halves of a layer as ONNX graphs.

    projecting:  hidden [n, d]                    → output [n, e], queries, keys and values side by side
    finishing:   hidden [n, d], attended [n, w]   → output [n, d]

Attention, between the two, has no weights, and knows which rows belong together: it stays outside. Each
linear layer of a block, by its name here `site`, has the low-rank updates of the batch as inputs, with the
ranks of all adapters side by side:

    y = x Wᵀ + bias + ((x {site}.aᵀ) ⊙ {site}.gates) {site}.b

a [R, in], b [R, out], gates [n, R], which is the scaling for ranks of a row's own adapter and 0 for others.
Without any, R = 0, a branch of the graph leaves the two products out.

Weights are in float32, in 8 bits with a scale for each output, or in 4 bits with one for every 64 of its
inputs, which is ONNX Runtime's MatMulNBits. What weights in bits multiply is rounded to bytes, each row by
itself, so that what a row gets depends on no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from molex.errors import BaseModelError
from molex.family import Family
from molex.lora import AdaptedLinear
from molex.native.weights import GROUP, Bits, rounded
from molex.prepack import in_and_out, weight_and_bias

FLOAT = TensorProto.FLOAT
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
# The first opset with RMSNormalization.
OPSETS = (helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1))
IR_VERSION = 11
IN_BYTES = 4
"""The `accuracy_level` at which MatMulNBits rounds rows to 8 bits and multiplies bytes: its fastest."""
LARGEST, MIDDLE = 127, 128
"""Of the whole numbers in 8 bits, and what stands for zero in bytes without a sign."""
TINIEST = 1e-30
"""The least step of a row: one of zeros alone has none."""


class Graph:
    """A graph that grows node by node; methods return the names of what nodes make."""

    def __init__(self, bits: Bits | None) -> None:
        self._bits = bits
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._rounded: dict[str, tuple[str, str]] = {}
        self._zero = self.constant(np.zeros((), np.float32))
        self._none = self.constant(np.zeros((), np.int64))

    def input(self, name: str, *shape: int | str) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, FLOAT, shape))
        return name

    def constant(self, values: npt.ArrayLike) -> str:
        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def node(self, operator: str, *inputs: str, domain: str = "", **options: Any) -> str:
        name = f"node{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name, domain=domain, **options))
        return name

    def linear(self, block: nn.Module, site: str, x: str) -> str:
        """A linear layer of a block, for x [n, in]."""
        weight, bias = weight_and_bias(_linear(block, site))
        added = self._added(site, x, weight, torch.zeros(len(weight)) if bias is None else bias)
        if self._bits is None:
            return self.node("Gemm", x, self.constant(weight.float().numpy()), added, transB=1)
        product = self._in_8_bits(x, weight) if self._bits == 8 else self._in_4_bits(x, weight)
        return self.node("Add", product, added)

    def _in_8_bits(self, x: str, weight: Tensor) -> str:
        """x Wᵀ with steps for each row of x [n, in] and each output of W [out, in]."""
        numbers, scales = rounded(weight[:, None], LARGEST, torch.float32)
        rows, steps = self._in_bytes(x)
        weights, of_outputs = self.constant(numbers[:, 0].T.numpy()), self.constant(scales[:, 0].numpy())
        middles = self.constant(np.uint8(MIDDLE)), self.constant(np.int8(0))
        inputs = (rows, weights, self.constant(np.float32(1)), of_outputs, *middles)
        product = self.node("MatMulIntegerToFloat", *inputs, domain=MICROSOFT)
        return self.node("Mul", product, self.node("Unsqueeze", steps, self.constant(np.array([1]))))

    def _in_bytes(self, x: str) -> tuple[str, str]:
        """x [n, in] in bytes around MIDDLE, and their steps [n]; once for all layers with the same input."""
        if x not in self._rounded:
            largest = self.node("ReduceMax", self.node("Abs", x), self.constant(np.array([1])), keepdims=0)
            steps = self.node("Mul", largest, self.constant(np.float32(1 / LARGEST)))
            steps = self.node("Max", steps, self.constant(np.float32(TINIEST)))
            middle = self.constant(np.array([MIDDLE], np.uint8))
            middles = self.node("Expand", middle, self.node("Shape", steps))
            self._rounded[x] = self.node("QuantizeLinear", x, steps, middles, axis=0), steps
        return self._rounded[x]

    def _in_4_bits(self, x: str, weight: Tensor) -> str:
        outputs, inputs = weight.shape
        constants = map(self.constant, in_blocks(weight))
        options = {"K": inputs, "N": outputs, "bits": 4, "block_size": GROUP, "accuracy_level": IN_BYTES}
        return self.node("MatMulNBits", x, *constants, domain=MICROSOFT, **options)

    def _added(self, site: str, x: str, weight: Tensor, bias: Tensor) -> str:
        """What is added to the product x Wᵀ: the bias [out], with updates where there are any [n, out]."""
        outputs, inputs = weight.shape
        a = self.input(f"{site}.a", f"{site}.ranks", inputs)
        b = self.input(f"{site}.b", f"{site}.ranks", outputs)
        gates = self.input(f"{site}.gates", "rows", f"{site}.ranks")
        base = self.constant(bias.float().numpy())
        narrow, scaled, own, kept, sums, alone = (f"{site}/{number}" for number in range(6))
        updated = [
            helper.make_node("Gemm", [x, a], [narrow], transB=1),
            helper.make_node("Mul", [narrow, gates], [scaled]),
            # What overflows in one adapter's factors is infinite, and 0 times that is NaN for another's rows.
            helper.make_node("Cast", [gates], [own], to=TensorProto.BOOL),
            helper.make_node("Where", [own, scaled, self._zero], [kept]),
            helper.make_node("Gemm", [kept, b, base], [sums]),
        ]
        there_are_some = self.node("Greater", self.node("Size", a), self._none)
        branches = {
            "then_branch": _branch(updated, sums),
            "else_branch": _branch([helper.make_node("Identity", [base], [alone])], alone),
        }
        return self.node("If", there_are_some, **branches)

    def norm(self, module: Any, x: str) -> str:
        """A LayerNorm, or an RMSNorm, of x [n, d]."""
        weight = self.constant(module.weight.detach().float().numpy())
        if not isinstance(module, nn.LayerNorm):
            return self.node("RMSNormalization", x, weight, axis=-1, epsilon=module.variance_epsilon)
        bias = self.constant(module.bias.detach().float().numpy())
        return self.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=module.eps)

    def model(self, output: str, width: int) -> ModelProto:
        """The whole graph; its output is called `output`."""
        self._nodes.append(helper.make_node("Identity", [output], ["output"]))
        value = helper.make_tensor_value_info("output", FLOAT, ["rows", width])
        graph = helper.make_graph(self._nodes, "half", self._inputs, [value], self._constants)
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)


def _branch(nodes: Sequence[Any], output: str) -> Any:
    return helper.make_graph(nodes, output, [], [helper.make_tensor_value_info(output, FLOAT, None)])


def _silu(graph: Graph, x: str) -> str:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def _gelu_tanh(graph: Graph, x: str) -> str:
    return graph.node("Gelu", x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": lambda graph, x: graph.node("Gelu", x),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda graph, x: graph.node("Relu", x),
    "silu": _silu,
    "swish": _silu,
}
"""By transformers' names."""


def layer_graphs(
    blocks: Sequence[nn.Module],
    family: Family,
    activation: str,
    bits: Bits | None,
    routed_bits: Bits | None,
) -> Iterator[tuple[bytes, bytes]]:
    """Both halves of each layer, and behind them those of the routed branch if its weights are others.

    Raises BaseModelError for a layer that is too large.
    """
    branches = [bits] if routed_bits == bits else [bits, routed_bits]
    for of_branch, (layer, block) in product(branches, enumerate(blocks)):
        try:
            halves = projecting(block, family, of_branch), finishing(block, family, activation, of_branch)
            yield halves[0].SerializeToString(), halves[1].SerializeToString()
        except EncodeError as error:
            message = f"a half of layer {layer} takes more than the 2 GB that an ONNX graph can hold"
            raise BaseModelError(message) from error


def projecting(block: nn.Module, family: Family, bits: Bits | None) -> ModelProto:
    """The first half of a block."""
    graph = Graph(bits)
    x = graph.input("hidden", "rows", _widths(block, family.projections[0])[0])
    if family.norm_before is not None:
        x = graph.norm(block.get_submodule(family.norm_before), x)
    parts = [graph.linear(block, site, x) for site in family.projections]
    width = sum(_widths(block, site)[1] for site in family.projections)
    return graph.model(graph.node("Concat", *parts, axis=-1), width)


def finishing(block: nn.Module, family: Family, activation: str, bits: Bits | None) -> ModelProto:
    """The second half of a block, whose function between `up` and `down` is one of `ACTIVATIONS`."""
    graph = Graph(bits)
    width, hidden_size = _widths(block, family.join)
    hidden, attended = graph.input("hidden", "rows", hidden_size), graph.input("attended", "rows", width)
    norms = [block.get_submodule(name) for name in family.norms]
    x = graph.node("Add", hidden, graph.linear(block, family.join, attended))
    if family.norm_before is not None:
        wide = _feed_forward(graph, block, family, activation, graph.norm(norms[1], x))
        return graph.model(graph.node("Add", x, wide), hidden_size)
    x = graph.norm(norms[0], x)
    wide = _feed_forward(graph, block, family, activation, x)
    return graph.model(graph.norm(norms[1], graph.node("Add", x, wide)), hidden_size)


def _feed_forward(graph: Graph, block: nn.Module, family: Family, activation: str, x: str) -> str:
    first, *others = (graph.linear(block, site, x) for site in family.up)
    wide = ACTIVATIONS[activation](graph, first)
    for other in others:
        wide = graph.node("Mul", wide, other)
    return graph.linear(block, family.down, wide)


def _widths(block: nn.Module, site: str) -> tuple[int, int]:
    """The inputs and outputs of a linear layer."""
    return in_and_out(_linear(block, site))


def _linear(block: nn.Module, site: str) -> nn.Module:
    module = block.get_submodule(site)
    assert isinstance(module, AdaptedLinear)
    return module.base


def vocabulary_graph(family: Family, config: Any) -> bytes | None:
    """hidden [n, d], weight [V, d] → output [n, V]; None for encoders.

    Weights that are inputs are read where they lie.
    """
    if not family.causal:
        return None
    graph, inputs, outputs = Graph(None), config.hidden_size, config.vocab_size
    hidden, weight = graph.input("hidden", "rows", inputs), graph.input("weight", outputs, inputs)
    model = graph.model(graph.node("Gemm", hidden, weight, transB=1), outputs)
    return model.SerializeToString()  # type: ignore[no-any-return]


def in_blocks(weight: Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """W [out, in] in 4 bits as MatMulNBits reads it: [out, blocks, bytes], and the scales [out, blocks].

    A byte holds two whole numbers from 1 to 15, which stand for -7 to 7, the first one low.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // GROUP)
    padded = nn.functional.pad(weight, (0, blocks * GROUP - inputs)).view(outputs, blocks, GROUP)
    numbers, scales = rounded(padded, 7, torch.float32)
    raised = (numbers + 8).to(torch.uint8)
    return (raised[..., ::2] | raised[..., 1::2] << 4).numpy(), scales.numpy()
