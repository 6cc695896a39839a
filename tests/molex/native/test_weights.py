"""Packed weights hold every weight once, at the place where the kernels read it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from molex.native.weights import TILE, pack


def unpacked(packed, sites):
    """W and b of each layer, read back through the pieces."""
    tiles, inputs, _ = packed.weights.shape
    together = 4 // packed.weights.element_size()
    columns = packed.weights.view(tiles, inputs // together, TILE, together).transpose(1, 2)
    columns = columns.reshape(tiles * TILE, inputs)
    assert not columns[:, packed.inputs :].any()
    found = {site: {} for site in sites}
    for tile, site, begin, first, width, _ in packed.pieces.tolist():
        for i in range(width):
            column = tile * TILE + begin + i
            scale = packed.scales[column] if len(packed.scales) else 1.0
            weight = columns[column, : packed.inputs].float() * scale
            assert found[site].setdefault(first + i, (weight, packed.bias[column])) == (
                weight,
                packed.bias[column],
            )
    return {
        site: [torch.stack(parts) for parts in zip(*(columns[i] for i in range(len(columns))), strict=True)]
        for site, columns in found.items()
    }


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(inputs=st.integers(1, 30), widths=st.lists(st.integers(1, 150), min_size=1, max_size=3))
def test_every_weight_is_found_again(dtype, int8, inputs, widths):
    torch.manual_seed(inputs)
    linears = [nn.Linear(inputs, width, dtype=dtype) for width in widths]
    sites = [3, 1, 7][: len(widths)]
    found = unpacked(pack(linears, sites, gated=False, int8=int8), sites)
    check(linears, sites, found, int8)


@given(inputs=st.integers(1, 9), width=st.integers(1, 150))
def test_gated_layers_alternate(inputs, width):
    torch.manual_seed(width)
    linears = [nn.Linear(inputs, width, bias=False) for _ in range(2)]
    packed = pack(linears, [4, 2], gated=True, int8=False)
    check(linears, [4, 2], unpacked(packed, [4, 2]), int8=False)
    for tile in range(len(packed.weights)):
        gate, up = packed.pieces[packed.pieces[:, 0] == tile].tolist()
        assert (gate[1], up[1], up[2]) == (4, 2, TILE // 2)
        assert gate[3:] == up[3:]


def check(linears, sites, found, int8):
    for linear, site in zip(linears, sites, strict=True):
        weight, bias = found[site]
        # Half a step of 127 from 0 to the largest weight of an output.
        step = linear.weight.float().abs().amax(1, keepdim=True) / 254 if int8 else 0.0
        assert ((weight - linear.weight.float()).abs() <= step * 1.001).all()
        torch.testing.assert_close(
            bias, torch.zeros(len(bias)) if linear.bias is None else linear.bias.float()
        )


def test_outputs_of_zero_weights_stay_zero_in_8_bits():
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    packed = pack([linear], [0], gated=False, int8=True)
    assert not packed.weights.any()
    assert packed.scales.isfinite().all()
