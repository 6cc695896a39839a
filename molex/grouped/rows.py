"""The rows of several layer calls in the order of their layers, which the device alone may know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from molex.stage import Stage


class Segments:
    """Neighbouring rows of one adapter in one layer call, for the m rows of a stage.

    `calls`, `members` and `lengths` [s] are the call, the adapter and the number of rows of each segment,
    `owners` [m] the segment of each row.
    """

    def __init__(self, stage: Stage, device: torch.device) -> None:
        lines = [
            (call, member, stop - start)
            for call, (runs, count) in enumerate(zip(stage.runs, stage.counts, strict=True))
            for member, start, stop in runs or [(0, 0, count)]
        ]
        # One copy to the device.
        calls, members, lengths = torch.tensor(lines).T.contiguous().to(device).unbind()
        self.calls, self.members, self.lengths = calls, members, lengths
        self.owners = torch.arange(len(lines), device=device).repeat_interleave(
            lengths, output_size=sum(stage.counts)
        )


@dataclass(frozen=True, eq=False)
class LayerRows:
    """m rows side by side by layer, those of one segment neighbours.

    `tokens` [m] are the rows of the batch's hidden states that they read. Where all are in one layer it is
    `layer`, and they lie as the stage has them. Else row i is row `order[i]` of the stage, whose row j is row
    `inverse[j]` here; `layers` [m] is the layer of each, `layer_ends` [T] where the rows of each layer end.

    `segment_ends` [s] is where segments end, `segment_pairs` [s] their layer and adapter, numbered
    layer · adapters of the batch + adapter. Ends are int32, as grouped products want them.
    """

    tokens: Tensor
    layer: int | None
    order: Tensor
    inverse: Tensor
    layers: Tensor
    layer_ends: Tensor
    segment_ends: Tensor
    segment_pairs: Tensor
    _lines: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, stage: Stage, segments: Segments, numbers: Sequence[int] | Tensor, num_layers: int
    ) -> LayerRows:
        """The rows of a stage, whose calls are of the layers `numbers` [c], of which there are so many.

        Nothing here waits for the device.
        """
        if not isinstance(numbers, Tensor) and len(numbers) == 1:
            return cls._in_one(stage, segments, numbers[0])
        numbers = torch.as_tensor(numbers, device=segments.calls.device)
        of_segments = numbers.index_select(0, segments.calls)
        layers, order = of_segments.index_select(0, segments.owners).sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        # Rows of a segment are neighbours and of one layer, so segments come in this order too.
        segment_layers, segment_order = of_segments.sort(stable=True)
        ends = segments.lengths.index_select(0, segment_order).cumsum(0)
        every_layer = torch.arange(num_layers, device=layers.device)
        return cls(
            stage.tokens.index_select(0, order),
            None,
            order,
            inverse,
            layers,
            torch.searchsorted(layers, every_layer, right=True, out_int32=True),
            ends.int(),
            segment_layers * _num_members(stage) + segments.members.index_select(0, segment_order),
        )

    @classmethod
    def _in_one(cls, stage: Stage, segments: Segments, layer: int) -> LayerRows:
        none = segments.owners[:0]
        ends = segments.lengths.cumsum(0).int()
        pairs = segments.members + layer * _num_members(stage)
        return cls(stage.tokens, layer, none, none, none, none, ends, pairs)

    def sorted(self, x: Tensor) -> Tensor:
        """Rows as the stage has them, by layer."""
        return x if self.layer is not None else x.index_select(0, self.order)

    def restored(self, x: Tensor) -> Tensor:
        """Rows by layer, as the stage has them."""
        return x if self.layer is not None else x.index_select(0, self.inverse)

    def of_rows(self, by_layer: Tensor) -> Tensor:
        """The line of each row's layer in [T, d]: [m, d]. Kept, for generations that ask at every step."""
        if id(by_layer) not in self._lines:
            self._lines[id(by_layer)] = by_layer.index_select(0, self.layers)
        return self._lines[id(by_layer)]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Each row of x [m, in] with the weight [out, in] and bias [out] of its layer: [m, out].

        `weight` is [T, out, in], `bias` [T, out].
        """
        if self.layer is not None:
            return functional.linear(x, weight[self.layer], None if bias is None else bias[self.layer])
        y = functional.grouped_mm(x, weight.mT, offs=self.layer_ends)
        return y if bias is None else y.add_(self.of_rows(bias))


def _num_members(stage: Stage) -> int:
    return len(stage.lora.adapters)
