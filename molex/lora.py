"""Low-rank updates of many adapters in one batch.

For packed rows x [n, in], base output y [n, out] and adapters a with factors A_a [r_a, in], B_a [out, r_a]
and scaling s_a:

    y[i] += s_a · B_a · A_a · x[i]        for each row i of adapter a

`low_rank_reference` is that sentence. `low_rank_blocks` updates neighbouring rows of several adapters in one
product, y += ((x A_catᵀ) ⊙ G) B_cat, where G [rows, ranks] is s_a for the ranks of the row's own adapter and
0 elsewhere. Wide blocks spend operations on zeros, narrow ones spend calls: `cut_into_blocks` weighs the two.
`low_rank_segments` does one product an adapter, for gradients.

Factors, and with them the product, are kept in at least float32: next to bfloat16 base weights that costs
little (on the CPU that we measured, products this small were slower in bfloat16) and rounds the update once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from molex.prepack import PrepackedLinear

Site = tuple[int, str]
"""A linear layer that can be adapted: (layer, name of the module in its block)."""


@dataclass(frozen=True)
class LowRank:
    """Factors A [r, in] and B [out, r] of one update, and the scaling of their product."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def takes_gradients(self) -> bool:
        """Whether the factors are being trained, so that a copy of them would soon be an old one."""
        return self.a.requires_grad or self.b.requires_grad


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """The low-rank updates of one adapter. `dropout` acts on their inputs while gradients are taken."""

    updates: Mapping[Site, LowRank] = field(default_factory=dict)
    dropout: float = 0.0


Segment = tuple[LowRank, int, int]
"""An update and the rows start..stop that it acts on."""


def low_rank_reference(y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The definition, row by row. y [n, out], x [n, in] → a new [n, out]."""
    result = y.clone()
    for update, start, stop in segments:
        for row in range(start, stop):
            result[row] += update.scaling * (update.b @ (update.a @ x[row]))
    return result


def low_rank_segments(y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """One product for each adapter's rows → a new [n, out], differentiable in y, x and the factors.

    x is in the precision of the factors; y may be in a lower one.
    """
    pieces: list[Tensor] = []
    end = 0
    for update, start, stop in segments:
        pieces.append(x.new_zeros(start - end, y.shape[1]))
        pieces.append(x[start:stop] @ update.a.T @ update.b.T * update.scaling)
        end = stop
    pieces.append(x.new_zeros(len(y) - end, y.shape[1]))
    return y + torch.cat(pieces).to(y.dtype)


@dataclass(frozen=True)
class Block:
    """Rows start..stop, which one product updates.

    `ranks` are the places of their adapters' ranks in a stack; `gates` [stop - start, ranks] is G, and
    `foreign` says where it is 0, or is None where it is nowhere.
    """

    start: int
    stop: int
    ranks: slice | Tensor
    gates: Tensor
    foreign: Tensor | None


@dataclass(frozen=True)
class Stack:
    """The factors of several adapters at a site side by side: a [R, in], b [R, out].

    `layout` lists the adapters by their index as in `Packed.members`, with the first of their ranks, the rank
    after their last, and the scaling.
    """

    a: Tensor
    b: Tensor
    layout: tuple[tuple[int, int, int, float], ...]

    @cached_property
    def places(self) -> dict[int, range]:
        """Where the ranks of each adapter are."""
        return {member: range(first, end) for member, first, end, _ in self.layout}

    @cached_property
    def scalings(self) -> dict[int, float]:
        return {member: scaling for member, _, _, scaling in self.layout}

    @property
    def width(self) -> int:
        """Inputs and outputs."""
        return self.a.shape[1] + self.b.shape[1]


def low_rank_blocks(y: Tensor, x: Tensor, stack: Stack, blocks: Sequence[Block]) -> Tensor:
    """One product for each block. Adds to y [n, out] in place; takes no gradients.

    x is in the precision of the factors; y may be in a lower one.
    """
    # A sum in a lower precision would take a pass over y for each product, and round it as often.
    wide = y.to(x.dtype)
    for block in blocks:
        rows = slice(block.start, block.stop)
        narrow = x[rows].mm(stack.a[block.ranks].T).mul_(block.gates)
        if block.foreign is not None:
            # What overflows in one adapter's factors is infinite, and 0 times that is NaN for another's rows.
            narrow.masked_fill_(block.foreign, 0)
        wide[rows].addmm_(narrow, stack.b[block.ranks])
    return y if wide is y else y.copy_(wide)


# What a product costs beside its operations, in floating-point operations that take as long: some ten
# microseconds of calls. See benchmarks/bench_kernels.py.
OPERATIONS_PER_CALL = 2_000_000

Run = tuple[int, int, int]
"""Rows of one adapter: its index as in `Packed.members`, the first row, the end."""


def cut_into_blocks(runs: Sequence[Run], stack: Stack, call_cost: int) -> list[Block]:
    """Neighbouring runs share a block where that spends less than `call_cost` operations more."""
    cut: list[list[Run]] = []
    for run in runs:
        if cut and _operations([*cut[-1], run], stack) <= call_cost + sum(
            _operations(apart, stack) for apart in (cut[-1], [run])
        ):
            cut[-1].append(run)
        else:
            cut.append([run])
    return [_block(together, stack, together[0][1], together[-1][2]) for together in cut]


def _operations(runs: Sequence[Run], stack: Stack) -> int:
    """Of one block, in floating point."""
    ranks = sum(len(stack.places[member]) for member, _, _ in runs)
    return 2 * (runs[-1][2] - runs[0][1]) * ranks * stack.width


def _block(runs: Sequence[Run], stack: Stack, first: int, end: int) -> Block:
    """Rows first..end, those of the runs and perhaps others."""
    places = [stack.places[member] for member, _, _ in runs]
    gates = np.zeros((end - first, sum(map(len, places))))
    column = 0
    for (member, start, stop), place in zip(runs, places, strict=True):
        gates[start - first : stop - first, column : column + len(place)] = stack.scalings[member]
        column += len(place)
    ranks: slice | Tensor = slice(places[0].start, places[-1].stop)
    if any(place.stop != after.start for place, after in pairwise(places)):
        ranks = torch.tensor([rank for place in places for rank in place], device=stack.a.device)
    gate = torch.from_numpy(gates).to(stack.a)
    return Block(first, end, ranks, gate, gate == 0 if len(runs) > 1 else None)


class BatchLora:
    """The updates of the distinct adapters of a batch, by site and by index as in `Packed.members`."""

    def __init__(self, adapters: Sequence[LoraWeights]) -> None:
        self.adapters = adapters
        self._stacks: dict[Site, Stack] = {}

    @cached_property
    def updates(self) -> dict[Site, dict[int, LowRank]]:
        """Made where they are asked for, which the kernels do not: they read tables of their own."""
        updates: dict[Site, dict[int, LowRank]] = {}
        for member, adapter in enumerate(self.adapters):
            for site, update in adapter.updates.items():
                updates.setdefault(site, {})[member] = update
        return updates

    def read(self, stacks: Mapping[Site, Stack]) -> None:
        """Use stacks that are there already."""
        self._stacks.update(stacks)

    def stack(self, site: Site) -> Stack:
        """The factors of every adapter at a site side by side; built once, but for factors that change."""
        kept = self._stacks.get(site)
        if kept is not None:
            return kept
        updates = self.updates[site]
        ends = list(accumulate(len(update.a) for update in updates.values()))
        stack = Stack(
            torch.cat([update.a for update in updates.values()]),
            torch.cat([update.b.T for update in updates.values()]),
            tuple(
                (member, end - len(update.a), end, update.scaling)
                for (member, update), end in zip(updates.items(), ends, strict=True)
            ),
        )
        if not any(update.takes_gradients for update in updates.values()):
            self._stacks[site] = stack
        return stack


class ActiveLora:
    """The low-rank updates for the rows that a layer is running on.

    `runs` lists the rows of each adapter, in order.
    """

    def __init__(self, batch: BatchLora, runs: Sequence[Run]) -> None:
        self.batch = batch
        self.runs = runs
        self._blocks: dict[Hashable, list[Block]] = {}
        self._whole: dict[Hashable, Block] = {}
        self._input: tuple[Tensor, Tensor] | None = None

    def add(self, y: Tensor, x: Tensor, site: Site) -> Tensor:
        """y [n, out] plus the updates at `site` of the adapters of the rows x [n, in]."""
        runs = self._runs_at(site)
        if not runs:
            return y
        updates = self.batch.updates[site]
        x = self._widened(x, updates[runs[0][0]].a.dtype)
        if torch.is_grad_enabled():
            x = functional.dropout(x, self._dropout(), training=True)
            return low_rank_segments(y, x, [(updates[member], start, stop) for member, start, stop in runs])
        stack = self.batch.stack(site)
        return low_rank_blocks(y, x, stack, self._cut(runs, stack))

    def side_by_side(self, site: Site, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The factors a [R, in] and b [R, out] of the rows' adapters at `site`, and G [count, R].

        None where no row has an update there.
        """
        runs = self._runs_at(site)
        if not runs:
            return None
        stack = self.batch.stack(site)
        if stack.layout not in self._whole:
            self._whole[stack.layout] = _block(runs, stack, 0, count)
        block = self._whole[stack.layout]
        return stack.a[block.ranks], stack.b[block.ranks], block.gates

    def _runs_at(self, site: Site) -> list[Run]:
        updates = self.batch.updates.get(site, {})
        return [run for run in self.runs if run[0] in updates]

    def _cut(self, runs: Sequence[Run], stack: Stack) -> list[Block]:
        """The same blocks at all sites where the adapters have the same ranks."""
        key = stack.layout, stack.width
        if key not in self._blocks:
            self._blocks[key] = cut_into_blocks(runs, stack, OPERATIONS_PER_CALL)
        return self._blocks[key]

    def _widened(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in the precision of the factors; queries, keys and values of a block share one conversion."""
        if x.dtype == dtype:
            return x
        if self._input is None or self._input[0] is not x:
            self._input = (x, x.to(dtype))
        return self._input[1]

    def forget_input(self) -> None:
        """Let go of the last layer's input: this object may outlive the layer by a whole pass."""
        self._input = None

    def _dropout(self) -> float:
        return max(adapter.dropout for adapter in self.batch.adapters)


class LoraSwitch:
    """What the adapted layers of a backbone add to their output at the moment; None: nothing."""

    active: ActiveLora | None = None

    def call(self, active: ActiveLora | None, half: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call one half of a layer, whose linear layers add the updates of `active`."""
        self.active = active
        try:
            return half(*inputs)
        finally:
            self.active = None
            if active is not None:
                active.forget_input()


class AdaptedLinear(nn.Module):
    """A linear layer of the base model that adds the low-rank updates of the batch that runs through it."""

    def __init__(self, base: nn.Module, site: Site, switch: LoraSwitch) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.switch = switch

    def prepack(self) -> None:
        self.base = PrepackedLinear(self.base)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(self.base(x), x)

    def adapted(self, y: Tensor, x: Tensor) -> Tensor:
        """The output y [n, out] of the layer for x, or of what runs in its place, plus the updates."""
        active = self.switch.active
        return y if active is None else active.add(y, x, self.site)
