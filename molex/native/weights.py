"""Weights as the kernels read them: tiles of 64 outputs, each belonging to one or two linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.prepack import weight_and_bias

TILE = 64
INPUTS_STEP = 4
"""Rows of all precisions are padded to a whole number of these: 8-bit products take four inputs at a time."""


@dataclass(frozen=True)
class PackedLinear:
    """Linear layers with the same input, whose outputs lie side by side, or alternate.

    `weights` [tiles, padded inputs, TILE] holds the inputs of a column two by two in bfloat16 and four by
    four in 8 bits; `bias` is [tiles · TILE]; `scales` [tiles · TILE] is what the 8-bit weights of a column
    are multiplied by, else empty. A line of `pieces` [n, 6] says of some columns of a tile: the tile, the
    layer (its place among the modules of a block), the first column in the tile, in the layer's output, how
    many, and the first column in the joint output.
    """

    weights: Tensor
    bias: Tensor
    scales: Tensor
    pieces: Tensor
    inputs: int

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weights, self.bias, self.scales, self.pieces]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Strip:
    """Columns first..first + width of a layer, which fill a tile or half of it."""

    site: int
    first: int
    width: int
    output: int


def pack(linears: Sequence[nn.Module], sites: Sequence[int], *, gated: bool, int8: bool) -> PackedLinear:
    """Pack layers whose places among a block's modules are `sites`.

    With `gated` there are two, and each tile has half its columns from either: the kernel multiplies them.
    With `int8` the weights of an output are rounded to 8 bits, on a scale of its own.
    """
    weights, biases = zip(*map(weight_and_bias, linears), strict=True)
    tiles = _gated_tiles(weights, sites) if gated else _tiles(weights, sites)
    outputs, inputs = len(tiles) * TILE, weights[0].shape[1]
    padded = -(-inputs // INPUTS_STEP) * INPUTS_STEP
    weight = weights[0].new_zeros(outputs, padded)
    bias = torch.zeros(outputs)
    pieces = []
    for number, tile in enumerate(tiles):
        for place, strip in enumerate(tile):
            begin = place * TILE // 2
            rows = slice(number * TILE + begin, number * TILE + begin + strip.width)
            source = slice(strip.first, strip.first + strip.width)
            layer = sites.index(strip.site)
            weight[rows, :inputs] = weights[layer][source]
            if (given := biases[layer]) is not None:
                bias[rows] = given[source].float()
            pieces.append([number, strip.site, begin, strip.first, strip.width, strip.output])
    scales = torch.empty(0)
    if int8:
        weight, scales = _rounded(weight)
    return PackedLinear(_ordered(weight), bias, scales, torch.tensor(pieces), inputs)


def _tiles(weights: Sequence[Tensor], sites: Sequence[int]) -> list[list[Strip]]:
    tiles, output = [], 0
    for weight, site in zip(weights, sites, strict=True):
        for first in range(0, len(weight), TILE):
            width = min(TILE, len(weight) - first)
            tiles.append([Strip(site, first, width, output + first)])
        output += len(weight)
    return tiles


def _gated_tiles(weights: Sequence[Tensor], sites: Sequence[int]) -> list[list[Strip]]:
    half, outputs = TILE // 2, len(weights[0])
    return [
        [Strip(site, first, min(half, outputs - first), first) for site in sites]
        for first in range(0, outputs, half)
    ]


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [out, in] in 8 bits, and the scale [out] of each output."""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    steps = torch.where(scales > 0, scales, 1.0)[:, None]
    return (wide / steps).round().to(torch.int8), scales


def _ordered(weight: Tensor) -> Tensor:
    """[out, in] → [tiles, in, TILE], with as many inputs of a column as fit 32 bits next to each other."""
    together = 4 // weight.element_size()
    tiles = weight.view(-1, TILE, weight.shape[1] // together, together)
    return tiles.transpose(1, 2).reshape(len(tiles), weight.shape[1], TILE).contiguous()
