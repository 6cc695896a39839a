"""Weights as MatMulNBits reads them, and the linear layers of the graphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import EncodeError
from hypothesis import given
from hypothesis import strategies as st

from molex import MolexModel
from molex.errors import BaseModelError
from molex.lora import ActiveLora, BatchLora, LoraWeights, LowRank, low_rank_reference
from molex.native.weights import GROUP
from molex.onnx import graphs
from molex.onnx.graphs import OPSETS, finishing, in_blocks, layer_graphs, projecting
from molex.onnx.layers import Half
from tests.tiny import DECODERS, ENCODERS


def unpacked(packed):
    """The whole numbers in the bytes, around zero: [out, blocks, GROUP]."""
    numbers = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
    return torch.from_numpy(numbers.astype(np.int32) - 8)


@given(st.integers(1, 5), st.integers(1, 3 * GROUP), st.integers(0, 9))
def test_rounded_weights_are_off_by_half_a_step_at_most(outputs, inputs, seed):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    packed, scales = in_blocks(weight)
    blocks = -(-inputs // GROUP)
    assert packed.shape == (outputs, blocks, GROUP // 2)
    assert scales.shape == (outputs, blocks)
    steps = torch.from_numpy(scales)[..., None].expand(-1, -1, GROUP).flatten(1)
    values = unpacked(packed).flatten(1) * steps
    assert not values[:, inputs:].any()
    assert ((values[:, :inputs] - weight).abs() <= steps[:, :inputs] * 0.500001).all()


def test_a_block_of_zeros_stays_zero():
    packed, scales = in_blocks(torch.zeros(2, GROUP))
    assert not scales.any()
    assert not unpacked(packed).any()


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_graphs_are_valid_onnx(family, bits, base_folder):
    backbone = MolexModel.from_pretrained(base_folder(family)).backbone
    activation = getattr(backbone.config, backbone.family.activation)
    block = backbone.stock_blocks[0]
    for graph in (
        projecting(block, backbone.family, bits),
        finishing(block, backbone.family, activation, bits),
    ):
        assert list(graph.opset_import) == list(OPSETS)
        onnx.checker.check_model(graph)


def low_rank(seed, rank, modules, site):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = modules[site]
    a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return LowRank(a, b, scaling=0.5 + seed)


@torch.inference_mode()
def test_updates_are_those_of_the_reference_and_do_not_stay(base_folder):
    backbone = MolexModel.from_pretrained(base_folder("gpt2")).backbone
    [site] = backbone.family.projections
    block, width = backbone.stock_blocks[0], backbone.modules[site][1]
    half = Half(projecting(block, backbone.family, None).SerializeToString())
    updates = [low_rank(seed, rank, backbone.modules, site) for seed, rank in enumerate((3, 1, 8))]
    batch = BatchLora([LoraWeights({(0, site): update}) for update in updates])
    hidden, output = torch.randn(9, backbone.config.hidden_size), torch.empty(9, width)
    half.run({"hidden": hidden}, None, 0, output)
    bare = output.clone()
    torch.testing.assert_close(bare, block.attn.c_attn(block.ln_1(hidden)), rtol=1e-5, atol=1e-5)
    # Rows 2 and 8 have no adapter, and one adapter has rows apart from each other.
    runs = [(2, 0, 2), (0, 3, 4), (1, 4, 7), (2, 7, 8)]
    half.run({"hidden": hidden}, ActiveLora(batch, runs), 0, output)
    segments = [(updates[member], start, stop) for member, start, stop in runs]
    expected = low_rank_reference(bare, block.ln_1(hidden), segments)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    half.run({"hidden": hidden}, ActiveLora(batch, runs), 1, output)
    assert torch.equal(output, bare)
    half.run({"hidden": hidden[:0]}, ActiveLora(batch, []), 0, output[:0])


@pytest.mark.parametrize(
    "flags", [{}, {"avx512_vnni": True}], ids=["slower products", "products of this CPU"]
)
@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_vnni"), reason="without VNNI the other products overflow"
)
@torch.inference_mode()
def test_products_of_the_largest_bytes_are_exact(flags, base_folder, monkeypatch):
    backbone = MolexModel.from_pretrained(base_folder("bert")).backbone
    block = backbone.stock_blocks[0]
    for site in backbone.family.projections:
        block.get_submodule(site).base.weight.fill_(1)
        block.get_submodule(site).base.bias.fill_(0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    half = Half(projecting(block, backbone.family, 8).SerializeToString())
    hidden, output = torch.ones(3, backbone.config.hidden_size), torch.empty(3, half.width)
    half.run({"hidden": hidden}, None, 0, output)
    torch.testing.assert_close(output, torch.full_like(output, backbone.config.hidden_size))


@torch.inference_mode()
def test_what_overflows_in_one_adapter_stays_there(base_folder):
    backbone = MolexModel.from_pretrained(base_folder("gpt2")).backbone
    [site] = backbone.family.projections
    half = Half(projecting(backbone.stock_blocks[0], backbone.family, None).SerializeToString())
    tame, wild = (low_rank(seed, 2, backbone.modules, site) for seed in (1, 2))
    wild = LowRank(wild.a.sign() * 3e38, wild.b, wild.scaling)
    batch = BatchLora([LoraWeights({(0, site): update}) for update in (tame, wild)])
    output = torch.empty(6, backbone.modules[site][1])
    hidden = torch.randn(6, backbone.config.hidden_size)
    half.run({"hidden": hidden}, ActiveLora(batch, [(0, 0, 2), (1, 2, 4), (0, 4, 6)]), 0, output)
    assert not output[2:4].isfinite().all()
    assert output[[0, 1, 4, 5]].isfinite().all()


def test_a_layer_that_is_too_large_is_named(base_folder, monkeypatch):
    def too_large(*_):
        raise EncodeError("Failed to serialize proto")

    backbone = MolexModel.from_pretrained(base_folder("gpt2")).backbone
    halves = layer_graphs(backbone.stock_blocks, backbone.family, "gelu", None, None)
    next(halves)
    # What protobuf says of 2 GB, which no test should make.
    monkeypatch.setattr(graphs, "finishing", too_large)
    with pytest.raises(BaseModelError, match="a half of layer 1 takes more than the 2 GB"):
        next(halves)
