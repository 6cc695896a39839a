"""Packed weights hold every weight once, at the place where the kernels read it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from molex.native.weights import GROUP, TILE, pack

STEPS = {8: 127, 4: 7}
# Of a scale: those of 4 bits are in bfloat16, which keeps 8 bits of it.
SCALE_ERROR = {8: 0.0, 4: 2**-8}


def unpacked(packed, sites):
    """W and b of each layer, read back through the pieces."""
    columns = columns_of(packed)
    assert not columns[:, packed.inputs :].any()
    found = {site: {} for site in sites}
    for tile, site, begin, first, width, _ in packed.pieces.tolist():
        for i in range(width):
            column = tile * TILE + begin + i
            weight = columns[column, : packed.inputs]
            assert found[site].setdefault(first + i, (weight, packed.bias[column])) == (
                weight,
                packed.bias[column],
            )
    return {
        site: [torch.stack(parts) for parts in zip(*(columns[i] for i in range(len(columns))), strict=True)]
        for site, columns in found.items()
    }


def columns_of(packed):
    """What the weights stand for [tiles · TILE, padded inputs]."""
    tiles, rows, _ = packed.weights.shape
    if packed.weights.dtype == torch.uint8:
        bytes_ = packed.weights.view(tiles, rows // 4, TILE, 4).transpose(1, 2).int()
        halves = torch.stack([bytes_ & 15, bytes_ >> 4], dim=3).reshape(tiles, TILE, 2 * rows)
        halves = torch.where(halves < 8, halves, halves - 16)
        scales = packed.scales.float().transpose(1, 2).repeat_interleave(GROUP, dim=2)[..., : 2 * rows]
        return (halves * scales).view(tiles * TILE, 2 * rows)
    together = 4 // packed.weights.element_size()
    columns = packed.weights.view(tiles, rows // together, TILE, together).transpose(1, 2)
    scales = packed.scales[:, None] if len(packed.scales) else 1.0
    return columns.reshape(tiles * TILE, rows).float() * scales


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(inputs=st.integers(1, 150), widths=st.lists(st.integers(1, 150), min_size=1, max_size=3))
def test_every_weight_is_found_again(dtype, bits, inputs, widths):
    torch.manual_seed(inputs)
    linears = [nn.Linear(inputs, width, dtype=dtype) for width in widths]
    sites = [3, 1, 7][: len(widths)]
    found = unpacked(pack(linears, sites, gated=False, bits=bits), sites)
    check(linears, sites, found, bits)


@given(inputs=st.integers(1, 9), width=st.integers(1, 150))
def test_gated_layers_alternate(inputs, width):
    torch.manual_seed(width)
    linears = [nn.Linear(inputs, width, bias=False) for _ in range(2)]
    packed = pack(linears, [4, 2], gated=True, bits=None)
    check(linears, [4, 2], unpacked(packed, [4, 2]), bits=None)
    for tile in range(len(packed.weights)):
        gate, up = packed.pieces[packed.pieces[:, 0] == tile].tolist()
        assert (gate[1], up[1], up[2]) == (4, 2, TILE // 2)
        assert gate[3:] == up[3:]


def check(linears, sites, found, bits):
    for linear, site in zip(linears, sites, strict=True):
        weight, bias = found[site]
        # Half a step of those from 0 to the largest weight of an output.
        step = linear.weight.float().abs().amax(1, keepdim=True) / STEPS[bits] / 2 if bits else 0.0
        limit = step * (1.001 + SCALE_ERROR[bits]) if bits else 0.0
        assert ((weight - linear.weight.float()).abs() <= limit).all()
        torch.testing.assert_close(
            bias, torch.zeros(len(bias)) if linear.bias is None else linear.bias.float()
        )


@pytest.mark.parametrize("bits", STEPS)
def test_outputs_of_zero_weights_stay_zero(bits):
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    packed = pack([linear], [0], gated=False, bits=bits)
    assert not columns_of(packed).any()
    assert packed.scales.isfinite().all()
