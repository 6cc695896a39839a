"""All layer calls of a depth as a few grouped products, whatever layers they are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from molex.family import Family
from molex.grouped.low_rank import ALIGNMENT, BatchFactors, PartFactors
from molex.grouped.rows import LayerRows, Segments
from molex.grouped.weights import StackedLinear, StackedNorm
from molex.layers import InPyTorch, StockLayers
from molex.lora import BatchLora, LoraWeights
from molex.packing import Packed
from molex.plan import RoutePlan
from molex.stage import Stage

Factors = Sequence[BatchFactors | None]
"""Of a batch's adapters for each part of a block; None where nobody updates it."""


class GroupedLayers(InPyTorch):
    """The layers of a base model, stacked by what they are; no gradients.

    Calls are of layers `numbers` [c], which may be a tensor on the device: nothing here waits for it.
    """

    first_routed = 0

    def __init__(self, stock: StockLayers, family: Family, config: Any) -> None:
        """Copies the weights of blocks, all of one precision."""
        blocks = stock.blocks
        self.dtype = stock.dtype
        self._num_layers = stock.num_layers
        self._norm_before = family.norm_before is not None
        self._activation = ACT2FN[getattr(config, family.activation)]
        self._gated = len(family.up) == 2
        names = [family.projections, (family.join,), family.up, (family.down,)]
        self._parts = [StackedLinear(blocks, part) for part in names]
        self._modules = [{name: stock.modules[name] for name in part} for part in names]
        self._norms = [StackedNorm(blocks, name) for name in family.norms]
        self.nbytes = sum(part.nbytes for part in self._parts) + sum(norm.nbytes for norm in self._norms)
        self._tables: WeakKeyDictionary[LoraWeights, list[PartFactors]] = WeakKeyDictionary()
        self._factors: tuple[ReferenceType[BatchLora], Factors] | None = None
        self._segments: WeakKeyDictionary[Stage, Segments] = WeakKeyDictionary()
        self._latest: tuple[ReferenceType[Stage], Sequence[int] | Tensor, LayerRows] | None = None

    @property
    def device(self) -> torch.device:
        return self._parts[0].weight.device

    def padded_rows(self, rows: int) -> int:
        return rows

    def compiled_sizes(self, _max_rows: int) -> Sequence[int]:
        """Nothing is compiled for a number of rows."""
        return []

    def project(self, stage: Stage, numbers: Sequence[int] | Tensor, hidden: Tensor) -> Tensor:
        rows = self.rows_of(stage, numbers)
        x = hidden.index_select(0, rows.tokens)
        return rows.restored(self.project_rows(x, rows, self.factors_of(stage.lora)))

    def finish(
        self, stage: Stage, numbers: Sequence[int] | Tensor, hidden: Tensor, attended: Tensor
    ) -> Sequence[Tensor]:
        rows = self.rows_of(stage, numbers)
        x = hidden.index_select(0, rows.tokens)
        return [rows.restored(self.finish_rows(x, rows.sorted(attended), rows, self.factors_of(stage.lora)))]

    def project_rows(self, x: Tensor, rows: LayerRows, factors: Factors) -> Tensor:
        """The first half for rows x [m, d] by layer."""
        if self._norm_before:
            x = self._norms[0](x, rows)
        return self._linear(0, x, rows, factors)

    def finish_rows(self, x: Tensor, attended: Tensor, rows: LayerRows, factors: Factors) -> Tensor:
        """The second half for rows x [m, d] by layer, and what attention returned for them."""
        x = x + self._linear(1, attended, rows, factors)
        if self._norm_before:
            return x + self._feed_forward(self._norms[1](x, rows), rows, factors)
        x = self._norms[0](x, rows)
        return self._norms[1](x + self._feed_forward(x, rows, factors), rows)

    def _feed_forward(self, x: Tensor, rows: LayerRows, factors: Factors) -> Tensor:
        wide = self._linear(2, x, rows, factors)
        if self._gated:
            gate, up = wide.chunk(2, dim=-1)
            return self._linear(3, self._activation(gate) * up, rows, factors)
        return self._linear(3, self._activation(wide), rows, factors)

    def _linear(self, part: int, x: Tensor, rows: LayerRows, factors: Factors) -> Tensor:
        y, updates = self._parts[part](x, rows), factors[part]
        return y if updates is None else updates.add(y, x, rows)

    def rows_of(self, stage: Stage, numbers: Sequence[int] | Tensor) -> LayerRows:
        """The rows of a stage by layer; kept for the second half, which often has the same stage."""
        if self._latest is not None:
            latest, of, rows = self._latest
            if latest() is stage and of is numbers:
                return rows
        if stage not in self._segments:
            self._segments[stage] = Segments(stage, self.device)
        rows = LayerRows.of(stage, self._segments[stage], numbers, self._num_layers)
        self._latest = (ref(stage), numbers, rows)
        return rows

    def factors_of(self, lora: BatchLora) -> Factors:
        """Those of a batch's adapters."""
        if self._factors is None or self._factors[0]() is not lora:
            tables = [self._table(weights) for weights in lora.adapters]
            by_part = zip(*tables, strict=True) if tables else [()] * len(self._parts)
            factors = [BatchFactors(part) if any(f.rank for f in part) else None for part in by_part]
            self._factors = (ref(lora), factors)
        return self._factors[1]

    def _table(self, lora: LoraWeights) -> list[PartFactors]:
        if lora not in self._tables:
            pairs = zip(self._modules, self._parts, strict=True)
            self._tables[lora] = [
                PartFactors(lora, modules, self._num_layers, part.weight) for modules, part in pairs
            ]
        return self._tables[lora]

    def mix(self, layout: Packed, plan: RoutePlan, outputs: Sequence[Tensor]) -> Tensor:
        together = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))
        sizes = [layout.num_tokens, *(int(layout.lengths[visitors].sum()) for _, visitors, _ in plan.groups)]
        return super().mix(layout, plan, together.split(sizes))


def can_group(stock: StockLayers) -> bool:
    """Whether PyTorch has a grouped product for layers: on a GPU, all in bfloat16, rows of whole 16 bytes."""
    widths = {width for shape in stock.modules.values() for width in shape}
    is_on_gpu = next(stock.blocks[0].parameters()).is_cuda
    return is_on_gpu and set(stock.dtypes) == {torch.bfloat16} and not any(w % ALIGNMENT for w in widths)
