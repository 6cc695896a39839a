"""Weights as the kernels read them: tiles of 64 outputs, each belonging to one or two linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from molex.prepack import weight_and_bias

TILE = 64
INPUTS_STEP = {None: 4, 8: 4, 4: 8}
"""Rows are padded to a whole number of these, by bits: 8-bit products take four inputs at a time."""
GROUP = 64
"""Inputs of an output that share a scale in 4 bits."""
Bits = Literal[4, 8]
"""Of weights that are rounded."""


@dataclass(frozen=True)
class PackedLinear:
    """Linear layers with the same input, whose outputs lie side by side, or alternate.

    `weights` [tiles, padded inputs, TILE] holds the inputs of a column two by two in bfloat16 and four by
    four in 8 bits. In 4 bits it is [tiles, padded inputs / 2, TILE], with four bytes of a column together,
    whose low halves are the first four of eight inputs, each with its sign. `bias` is [tiles · TILE];
    `scales`, [tiles · TILE] in float32 for 8 bits and [tiles, groups, TILE] in bfloat16 for 4, is what the
    weights of a column are multiplied by, else empty.

    A line of `pieces` [n, 6] says of some columns of a tile: the tile, the layer (its place among the modules
    of a block), the first column in the tile, in the layer's output, how many, and the first column in the
    joint output.
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


def pack(
    linears: Sequence[nn.Module], sites: Sequence[int], *, gated: bool, bits: Bits | None
) -> PackedLinear:
    """Pack layers whose places among a block's modules are `sites`.

    With `gated` there are two, and each tile has half its columns from either: the kernel multiplies them.
    With `bits` weights are rounded: to 8 on a scale of each output, to 4 on one for every 64 of its inputs.
    """
    weights, biases = zip(*map(weight_and_bias, linears), strict=True)
    tiles = _gated_tiles(weights, sites) if gated else _tiles(weights, sites)
    outputs, inputs = len(tiles) * TILE, weights[0].shape[1]
    padded = -(-inputs // INPUTS_STEP[bits]) * INPUTS_STEP[bits]
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
    if bits is None:
        ordered, scales = _ordered(weight), torch.empty(0)
    elif bits == 8:
        numbers, scales = rounded(weight[:, None], 127, torch.float32)
        ordered, scales = _ordered(numbers[:, 0]), scales[:, 0]
    else:
        ordered, scales = _nibbles(weight)
    return PackedLinear(ordered, bias, scales, torch.tensor(pieces), inputs)


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


def rounded(weight: Tensor, largest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [out, groups, in] as whole numbers up to `largest`, and the scales [out, groups] in `dtype`."""
    wide = weight.float()
    scales = (wide.abs().amax(-1) / largest).to(dtype)
    steps = torch.where(scales > 0, scales.float(), 1.0)[..., None]
    return (wide / steps).round().clamp(-largest, largest).to(torch.int8), scales


def _nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [out, in] in 4 bits [tiles, in / 2, TILE], and the scales [tiles, groups, TILE].

    Weights are multiples of the scales as these are after rounding, so bfloat16 costs them next to nothing.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // GROUP)
    padded = nn.functional.pad(weight, (0, groups * GROUP - inputs)).view(outputs, groups, GROUP)
    numbers, scales = rounded(padded, 7, torch.bfloat16)
    halves = (numbers & 15).to(torch.uint8).view(outputs, -1)[:, :inputs].view(-1, TILE, inputs // 8, 2, 4)
    packed = halves[..., 0, :] | halves[..., 1, :] << 4
    ordered = packed.transpose(1, 2).reshape(-1, inputs // 2, TILE).contiguous()
    return ordered, scales.view(-1, TILE, groups).transpose(1, 2).contiguous()


def _ordered(weight: Tensor) -> Tensor:
    """[out, in] → [tiles, in, TILE], with as many inputs of a column as fit 32 bits next to each other."""
    together = 4 // weight.element_size()
    tiles = weight.view(-1, TILE, weight.shape[1] // together, together)
    return tiles.transpose(1, 2).reshape(len(tiles), weight.shape[1], TILE).contiguous()
