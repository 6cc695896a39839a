"""All layers of a base model as one ONNX graph.

    graph = encoder(weights, config, bits=None)

The graphs are made of the operators that ONNX Runtime has for such layers (its domain com.microsoft), which
its optimiser would put in place of plainer ones at best. Query, key and value are one product. Low-rank
factors are inputs: those of query and value side by side, [d, 2r], and in blocks, [2r, e], so that an update
is two products and one sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as rounding

Array = npt.NDArray[Any]
FLOAT = TensorProto.FLOAT
MICROSOFT = "com.microsoft"
OPSETS = (helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1))
IR_VERSION = 10
BLOCK = 64
"""Inputs of an output that share a scale, as in our 4 bits."""
IN_BYTES = 4
"""The `accuracy_level` at which MatMulNBits rounds rows to 8 bits and multiplies bytes: its fastest."""
ROUND = {4: rounding.quantize_matmul_4bits, 8: rounding.quantize_matmul_8bits}


class Builder:
    """A graph that grows node by node; methods return the names of what nodes make."""

    def __init__(self, bits: int | None) -> None:
        """With `bits` linear layers are MatMulNBits, else MatMul in float32."""
        self._bits = bits
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []

    def input(self, name: str, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, FLOAT, shape))
        return name

    def constant(self, array: Array) -> str:
        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, operator: str, *inputs: str, outputs: int = 1, domain: str = "", **options: Any) -> Any:
        """The name of its output, or a list of them where it has several."""
        number = len(self._nodes)
        names = [f"node{number}.{place}" for place in range(outputs)]
        node = helper.make_node(operator, inputs, names, f"node{number}", domain=domain, **options)
        self._nodes.append(node)
        return names[0] if outputs == 1 else names

    def fused(self, operator: str, *inputs: str, outputs: int = 1, **options: Any) -> Any:
        """One of ONNX Runtime's own operators."""
        return self.node(operator, *inputs, outputs=outputs, domain=MICROSOFT, **options)

    def linear(self, x: str, *weights: Array) -> str:
        """The outputs of linear layers [out, in] side by side, without their biases."""
        weight = np.concatenate(weights)
        if self._bits is None:
            return str(self.node("MatMul", x, self.constant(weight.T)))
        packed, scales = rounded(weight, self._bits)
        outputs, inputs = weight.shape
        options = {"K": inputs, "N": outputs, "bits": self._bits, "block_size": BLOCK}
        constants = self.constant(packed), self.constant(scales)
        return str(self.fused("MatMulNBits", x, *constants, accuracy_level=IN_BYTES, **options))

    def updated(self, y: str, x: str, layer: int, weights: Sequence[Array]) -> str:
        """y, the output of linear layers for x, plus the low-rank updates of a layer."""
        a = self.input(f"a{layer}", [weights[0].shape[1], "ranks"])
        b = self.input(f"b{layer}", ["ranks", sum(map(len, weights))])
        return str(self.node("Add", y, self.node("MatMul", self.node("MatMul", x, a), b)))

    def model(self, outputs: Mapping[str, Sequence[int | str]]) -> ModelProto:
        """The graph with the shapes of its outputs."""
        values = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self._nodes, "layers", self._inputs, values, self._constants)
        return helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)


def rounded(weight: Array, bits: int) -> tuple[Array, Array]:
    """Weights [out, in] as MatMulNBits reads them: whole numbers, and scales around the middle."""
    outputs, inputs = weight.shape
    blocks = inputs // BLOCK
    packed = np.zeros((outputs, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.zeros(outputs * blocks, np.float32)
    zeros = np.zeros(outputs * -(-blocks * bits // 8), np.uint8)
    columns = np.ascontiguousarray(weight.T, np.float32)
    ROUND[bits](packed, columns, scales, zeros, BLOCK, outputs, inputs, True)
    return packed, scales.reshape(outputs, blocks)


def encoder(weights: Mapping[str, Array], config: Mapping[str, Any], bits: int | None) -> ModelProto:
    """BERT's layers one after another: `hidden` [requests, tokens, d] → `output`, all as long."""
    graph, width = Builder(bits), config["hidden_size"]
    shape = ["requests", "tokens", width]
    x = graph.input("hidden", shape)
    for layer in range(config["num_hidden_layers"]):
        x = _encoder_layer(graph, layer, x, weights, config)
    return graph.model({x: shape})


def _encoder_layer(
    graph: Builder, layer: int, x: str, weights: Mapping[str, Array], config: Mapping[str, Any]
) -> str:
    def weight(name: str) -> Array:
        return weights[f"encoder.layer.{layer}.{name}.weight"]

    def bias(name: str) -> Array:
        return weights[f"encoder.layer.{layer}.{name}.bias"]

    def normed(y: str, skipped: str, linear: str, norm: str) -> str:
        constants = [graph.constant(array) for array in (weight(norm), bias(norm), bias(linear))]
        options = {"epsilon": config["layer_norm_eps"]}
        return str(graph.fused("SkipLayerNormalization", y, skipped, *constants, **options))

    names = [f"attention.self.{name}" for name in ("query", "key", "value")]
    projections = [weight(name) for name in names]
    heads = graph.updated(graph.linear(x, *projections), x, layer, projections)
    lengths = np.array([len(projection) for projection in projections], np.int64)
    parts = graph.node("Split", heads, graph.constant(lengths), outputs=3, axis=-1)
    biases = graph.constant(np.concatenate([bias(name) for name in names]))
    options = {"num_heads": config["num_attention_heads"]}
    attended = graph.fused("MultiHeadAttention", *parts, biases, **options)
    joined = graph.linear(attended, weight("attention.output.dense"))
    x = normed(joined, x, "attention.output.dense", "attention.output.LayerNorm")
    wide = graph.linear(x, weight("intermediate.dense"))
    wide = graph.fused("BiasGelu", wide, graph.constant(bias("intermediate.dense")))
    return normed(graph.linear(wide, weight("output.dense")), x, "output.dense", "output.LayerNorm")


def decoder(weights: Mapping[str, Array], config: Mapping[str, Any], bits: int | None) -> ModelProto:
    """What of Llama's layers is not attention, each on the same rows `hidden` [rows, d].

    Two outputs a layer: queries, keys and values side by side [rows, e], and hidden states, as if attention
    had returned the rows themselves.
    """
    graph, width = Builder(bits), config["hidden_size"]
    x = graph.input("hidden", ["rows", width])
    outputs: dict[str, Sequence[int | str]] = {}
    for layer in range(config["num_hidden_layers"]):
        heads, hidden = _decoder_layer(graph, layer, x, weights, config)
        outputs |= {heads: ["rows", width + 2 * _key_width(config)], hidden: ["rows", width]}
    return graph.model(outputs)


def _key_width(config: Mapping[str, Any]) -> int:
    return int(config["num_key_value_heads"] * config["head_dim"])


def _decoder_layer(
    graph: Builder, layer: int, x: str, weights: Mapping[str, Array], config: Mapping[str, Any]
) -> tuple[str, str]:
    def weight(name: str) -> Array:
        return weights[f"model.layers.{layer}.{name}.weight"]

    eps = {"epsilon": config["rms_norm_eps"]}
    projections = [weight(f"self_attn.{name}_proj") for name in ("q", "k", "v")]
    norm = graph.constant(weight("input_layernorm"))
    normed = graph.node("SimplifiedLayerNormalization", x, norm, axis=-1, **eps)
    heads = graph.updated(graph.linear(normed, *projections), normed, layer, projections)
    joined = graph.linear(x, weight("self_attn.o_proj"))
    norm = graph.constant(weight("post_attention_layernorm"))
    normed, _, _, x = graph.fused("SkipSimplifiedLayerNormalization", joined, x, norm, outputs=4, **eps)
    gate = graph.linear(normed, weight("mlp.gate_proj"))
    up = graph.linear(normed, weight("mlp.up_proj"))
    # SiLU is x · sigmoid(x), which is this operator's function with a slope of 1.
    wide = graph.node("Mul", graph.fused("QuickGelu", gate, alpha=1.0), up)
    return heads, str(graph.node("Add", graph.linear(wide, weight("mlp.down_proj")), x))
