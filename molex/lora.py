"""Low-rank updates of many adapters in one batch.

One operation, three ways to compute it. For packed rows x [n, in], base output y [n, out] and adapters
a with factors A_a [r_a, in], B_a [out, r_a] and scaling s_a:

    y[i] += s_a · B_a · A_a · x[i]        for each row i of adapter a

`low_rank_reference` is that sentence. `low_rank_gated` does all adapters in one product,
y += ((x A_catᵀ) ⊙ G) B_cat, where G [n, R] is s_a for the ranks of the row's own adapter and 0 elsewhere.
`low_rank_segments` does one small product an adapter. The first costs width, the second costs calls.

Factors, and with them the product, are kept in at least float32: next to bfloat16 base weights that costs
little (on the CPU that we measured, products this small were slower in bfloat16) and rounds the update once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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

    # Views, kept: a batch takes thousands of them. Not for where gradients are taken.
    @cached_property
    def a_transposed(self) -> Tensor:
        return self.a.detach().T

    @cached_property
    def b_transposed(self) -> Tensor:
        return self.b.detach().T


@dataclass(frozen=True)
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
    """One product for each adapter's rows. Adds to y [n, out] in place where no gradient is taken.

    x is in the precision of the factors; y may be in a lower one.
    """
    if torch.is_grad_enabled():
        return y + _segment_products(y, x, segments).to(y.dtype)
    # A sum in a lower precision would take a pass over y for each product, and round it as often.
    wide = y.to(x.dtype)
    for update, start, stop in segments:
        narrow = x[start:stop].mm(update.a_transposed)
        wide[start:stop].addmm_(narrow, update.b_transposed, alpha=update.scaling)
    return y if wide is y else y.copy_(wide)


def _segment_products(y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The update of every row [n, out], zero between the segments; differentiable in x and the factors."""
    pieces: list[Tensor] = []
    end = 0
    for update, start, stop in segments:
        pieces.append(x.new_zeros(start - end, y.shape[1]))
        pieces.append(x[start:stop] @ update.a.T @ update.b.T * update.scaling)
        end = stop
    pieces.append(x.new_zeros(len(y) - end, y.shape[1]))
    return torch.cat(pieces)


def low_rank_gated(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """All adapters at once: a [R, in] and b [R, out] side by side, gates [n, R] their scalings."""
    narrow = (x @ a.T) * gates
    return torch.addmm(y, narrow, b) if y.dtype == x.dtype else y + (narrow @ b).to(y.dtype)


@dataclass(frozen=True)
class _Stack:
    """All factors of a site side by side: a [R, in], b [R, out], scalings [R].

    `layout` lists (member, rank) in order, `owners` [R] is the member of each rank.
    """

    a: Tensor
    b: Tensor
    scalings: Tensor
    owners: Tensor
    layout: tuple[tuple[int, int], ...]


class BatchLora:
    """The updates of the distinct adapters of a batch, by site and by index as in `Packed.members`."""

    def __init__(self, adapters: Sequence[LoraWeights]) -> None:
        self.adapters = adapters
        self.updates: dict[Site, dict[int, LowRank]] = {}
        for member, adapter in enumerate(adapters):
            for site, update in adapter.updates.items():
                self.updates.setdefault(site, {})[member] = update
        self.ranks = {site: sum(u.a.shape[0] for u in by.values()) for site, by in self.updates.items()}
        self._stacks: dict[Site, _Stack] = {}

    def stack(self, site: Site) -> _Stack:
        """The factors of every adapter at a site side by side, built once."""
        if site not in self._stacks:
            self._stacks[site] = self._build(self.updates[site])
        return self._stacks[site]

    def _build(self, updates: Mapping[int, LowRank]) -> _Stack:
        layout = tuple((member, update.a.shape[0]) for member, update in updates.items())
        a = torch.cat([update.a for update in updates.values()])
        b = torch.cat([update.b.T for update in updates.values()])
        ranks = torch.tensor([rank for _, rank in layout])
        owners = torch.tensor([member for member, _ in layout]).repeat_interleave(ranks)
        scalings = torch.tensor([u.scaling for u in updates.values()]).repeat_interleave(ranks)
        return _Stack(a, b, scalings.to(a), owners.to(a.device), layout)


# Where the wide product stops being cheaper than a call for each adapter: floating-point operations that
# fit in the overhead of one small call. See benchmarks/bench_kernels.py.
OPERATIONS_PER_CALL = 2_000_000


class ActiveLora:
    """The low-rank updates for the rows that a layer is running on.

    `segments` lists the runs of rows of one adapter, from the first row on: (member, first row, end).
    """

    def __init__(self, batch: BatchLora, segments: Sequence[tuple[int, int, int]]) -> None:
        self.batch = batch
        self.segments = segments
        self._gates: dict[tuple[tuple[int, int], ...], Tensor] = {}
        self._input: tuple[Tensor, Tensor] | None = None

    def add(self, y: Tensor, x: Tensor, site: Site) -> Tensor:
        """y [n, out] plus the updates at `site` of the adapters of the rows x [n, in]."""
        updates = self.batch.updates.get(site)
        if updates is None:
            return y
        segments = [(updates[m], start, stop) for m, start, stop in self.segments if m in updates]
        if not segments:
            return y
        x = self._widened(x, segments[0][0].a.dtype)
        if torch.is_grad_enabled():
            x = functional.dropout(x, self._dropout(), training=True)
        elif len(segments) > 1 and self._gated_is_cheaper(y, x, site, len(segments)):
            stack = self.batch.stack(site)
            return low_rank_gated(y, x, stack.a, stack.b, self._gate(stack, len(y)))
        return low_rank_segments(y, x, segments)

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

    def _gated_is_cheaper(self, y: Tensor, x: Tensor, site: Site, calls: int) -> bool:
        operations = 2 * len(x) * self.batch.ranks[site] * (x.shape[1] + y.shape[1])
        return operations < calls * OPERATIONS_PER_CALL

    def _gate(self, stack: _Stack, rows: int) -> Tensor:
        """G [n, R]: the scaling where a rank belongs to the row's adapter, else 0; kept by layout."""
        if stack.layout not in self._gates:
            owned = torch.tensor([(m, stop - start) for m, start, stop in self.segments])
            members = owned[:, 0].repeat_interleave(owned[:, 1]).to(stack.owners.device)
            gates = (members[:, None] == stack.owners) * stack.scalings
            self._gates[stack.layout] = functional.pad(gates, (0, 0, 0, rows - len(gates)))
        return self._gates[stack.layout]


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
