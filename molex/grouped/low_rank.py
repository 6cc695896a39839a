"""Low-rank updates as grouped products: a group is the rows of one adapter in one layer.

The modules of a part of a block, queries, keys and values for one, read the same input, and their outputs lie
side by side. So their updates are one: A has the ranks of all of them, and B is zero where a rank of one
module meets the outputs of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from molex.grouped.rows import LayerRows
from molex.lora import LoraWeights, LowRank

ALIGNMENT = 8
"""Grouped products want rows that begin at a multiple of 16 bytes: 8 numbers of 16 bits."""
MAX_GROUPS = 1023
"""In one product of PyTorch's on a GPU."""
ROWS_PER_STEP = 256
"""Where every row has factors of its own, copies of those of so many are in memory at a time."""


class PartFactors:
    """The factors of one adapter for a part of T layers: a [T, R, in], and b [T, R, out] times the scaling.

    Zero where the adapter updates nothing.
    """

    def __init__(
        self,
        lora: LoraWeights,
        modules: Mapping[str, tuple[int, int]],
        num_layers: int,
        like: Tensor,
    ) -> None:
        """`modules` are those of the part, with (inputs, outputs); `like` has precision and device."""
        inputs = next(iter(modules.values()))[0]
        outputs = sum(width for _, width in modules.values())
        a, b, first = [like.new_zeros(num_layers, 0, inputs)], [like.new_zeros(num_layers, 0, outputs)], 0
        for name, (_, width) in modules.items():
            updates = [lora.updates.get((layer, name)) for layer in range(num_layers)]
            rank = max((len(update.a) for update in updates if update is not None), default=0)
            if rank:
                a.append(torch.stack([_a(update, rank, inputs, like) for update in updates]))
                wide = torch.stack([_b(update, rank, width, like) for update in updates])
                b.append(functional.pad(wide, (first, outputs - first - width)))
            first += width
        self.a, self.b = torch.cat(a, dim=1), torch.cat(b, dim=1)

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def _a(update: LowRank | None, rank: int, width: int, like: Tensor) -> Tensor:
    return like.new_zeros(rank, width) if update is None else _padded(update.a.detach().to(like), rank)


def _b(update: LowRank | None, rank: int, width: int, like: Tensor) -> Tensor:
    if update is None:
        return like.new_zeros(rank, width)
    return _padded((update.b.detach() * update.scaling).T.to(like), rank)


def _padded(x: Tensor, rank: int) -> Tensor:
    """Zeros below [r, width], or below each of [T, r, width], up to `rank`."""
    return functional.pad(x, (0, 0, 0, rank - x.shape[-2]))


class BatchFactors:
    """The factors of all adapters of a batch for a part: a [T · members, R, in], b [T · members, R, out].

    R is a multiple of `ALIGNMENT`.
    """

    def __init__(self, members: Sequence[PartFactors]) -> None:
        most = max(factors.rank for factors in members)
        rank = -(-most // ALIGNMENT) * ALIGNMENT
        self.a, self.b = (
            torch.stack([_padded(factor, rank) for factor in factors], dim=1).flatten(0, 1)
            for factors in ([member.a for member in members], [member.b for member in members])
        )

    def add(self, y: Tensor, x: Tensor, rows: LayerRows) -> Tensor:
        """y [m, out] plus the updates of x [m, in], of each row by its layer and adapter; changes y."""
        pairs = rows.segment_pairs
        if len(pairs) > MAX_GROUPS:
            return self._add_by_row(y, x, rows)
        a, b = self.a.index_select(0, pairs), self.b.index_select(0, pairs)
        narrow = functional.grouped_mm(x, a.mT, offs=rows.segment_ends)
        return y.add_(functional.grouped_mm(narrow, b, offs=rows.segment_ends))

    def _add_by_row(self, y: Tensor, x: Tensor, rows: LayerRows) -> Tensor:
        """With so many segments there are few rows in each: every row brings its factors."""
        ends = rows.segment_ends
        segments = torch.searchsorted(
            ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True
        )
        pairs = rows.segment_pairs.index_select(0, segments)
        for first in range(0, len(x), ROWS_PER_STEP):
            step = slice(first, first + ROWS_PER_STEP)
            a, b = self.a.index_select(0, pairs[step]), self.b.index_select(0, pairs[step])
            y[step] += x[step, None].bmm(a.mT).bmm(b)[:, 0]
        return y
