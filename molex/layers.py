"""The layers of a base model, each in two halves with attention between them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molex.attention import AttentionOptions, KVStreams, attend
from molex.config import VoteConfig
from molex.family import Family
from molex.gate import Gate, gate_logits
from molex.lora import ActiveLora, AdaptedLinear, LoraSwitch
from molex.mixing import mix
from molex.packing import Indices, Packed
from molex.plan import RoutePlan
from molex.prepack import can_prepack, in_and_out, padded_rows
from molex.projections import Projections
from molex.stage import Stage
from molex.votes import Ballots, Election, elect


class Layers(Protocol):
    """T layers, any of which run on any rows, or 2T where the routed branch has a precision of its own.

    A call of a half runs several layers, `numbers`, each on its own rows of the hidden states [m, d], which
    the stage lists call by call.
    """

    @property
    def first_routed(self) -> int:
        """The number of layer 0 in the routed branch: T, or 0 where that has the same layers."""

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, queries, keys and values."""

    @property
    def nbytes(self) -> int:
        """Of all weights, in memory."""

    def project(self, stage: Stage, numbers: Sequence[int], hidden: Tensor) -> Tensor:
        """The first half: queries, keys and values side by side [n, e], without padding between calls."""

    def finish(
        self, stage: Stage, numbers: Sequence[int], hidden: Tensor, attended: Tensor
    ) -> Sequence[Tensor]:
        """The second half, from what attention returned for the rows: the outputs [rows, d] of the calls, in
        a piece each or side by side.
        """

    def attend(
        self, heads: Tensor, packed: Packed, kv: KVStreams | None, options: AttentionOptions, rows: Indices
    ) -> Tensor:
        """What lies between the halves; see `packed_attention`."""

    def gate_logits(
        self, gates: Sequence[Gate], lengths: Sequence[Sequence[int]], hidden: Tensor, tokens: Tensor
    ) -> Tensor:
        """The logits of gates on the rows `tokens` of the hidden states; see `molex.gate.gate_logits`."""

    def elect(self, ballots: Ballots, vote: VoteConfig, top_k: int) -> Election:
        """The votes of requests; see `molex.votes.elect`."""

    def mix(self, layout: Packed, plan: RoutePlan, outputs: Sequence[Tensor]) -> Tensor:
        """The mixture of what `finish` returned for a depth; see `molex.mixing.mix`."""

    def vocabulary(self, head: nn.Module) -> nn.Module:
        """What runs the language model head of the base: hidden states [..., d] → logits [..., V]."""

    def padded_rows(self, rows: int) -> int:
        """How many rows a call needs for `rows`; the others may hold anything."""

    def compiled_sizes(self, max_rows: int) -> Sequence[int]:
        """The numbers of rows up to `max_rows` that kernels are compiled for, one by one at first use."""


class InPyTorch:
    """What lies between the halves of layers and behind them, on PyTorch's operations: a part of `Layers`."""

    def attend(
        self, heads: Tensor, packed: Packed, kv: KVStreams | None, options: AttentionOptions, rows: Indices
    ) -> Tensor:
        return attend(heads, packed, kv, options, rows)

    def gate_logits(
        self, gates: Sequence[Gate], lengths: Sequence[Sequence[int]], hidden: Tensor, tokens: Tensor
    ) -> Tensor:
        return gate_logits(gates, lengths, hidden, tokens)

    def elect(self, ballots: Ballots, vote: VoteConfig, top_k: int) -> Election:
        return elect(ballots, vote, top_k)

    def mix(self, layout: Packed, plan: RoutePlan, outputs: Sequence[Tensor]) -> Tensor:
        return mix(layout, plan, outputs)

    def vocabulary(self, head: nn.Module) -> nn.Module:
        return head


class StockLayers(InPyTorch):
    """The T blocks of a transformers model, whose linear layers add the low-rank updates of the batch.

    `routed` are those of the routed branch, where they have a precision of their own. `modules` gives the
    linear layers of a block and their (inputs, outputs).
    """

    def __init__(self, blocks: Sequence[Any], family: Family, routed: Sequence[Any] = ()) -> None:
        self.blocks = [*blocks, *routed]
        self.num_layers = len(blocks)
        self.first_routed = len(routed)
        self.dtypes: list[torch.dtype] = [next(block.parameters()).dtype for block in self.blocks]
        self.nbytes = sum(parameter.nbytes for block in self.blocks for parameter in block.parameters())
        self.switch = LoraSwitch()
        self.modules = _wrap_linear_layers(blocks, self.switch)
        _wrap_linear_layers(routed, self.switch)
        self._family = family
        self._projections = [
            Projections([block.get_submodule(name) for name in family.projections]) for block in self.blocks
        ]
        self._prepacked = False

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    def prepack(self) -> None:
        """Lay the weights out for inference (`molex/prepack.py`); no gradients afterwards."""
        device = next(self.blocks[0].parameters()).device
        if self._prepacked:
            return
        for block, projections, dtype in zip(self.blocks, self._projections, self.dtypes, strict=True):
            if not can_prepack(dtype, device):
                continue
            self._prepacked = True
            projections.prepack()
            for module in block.modules():
                if isinstance(module, AdaptedLinear) and module not in projections.modules:
                    module.prepack()

    def padded_rows(self, rows: int) -> int:
        return padded_rows(rows) if self._prepacked else rows

    def compiled_sizes(self, max_rows: int) -> Sequence[int]:
        return sorted({padded_rows(rows) for rows in range(1, max_rows + 1)}) if self._prepacked else []

    def project(self, stage: Stage, numbers: Sequence[int], hidden: Tensor) -> Tensor:
        calls = zip(numbers, stage.read(hidden), stage.active, stage.counts, strict=True)
        pieces = [self._project(number, x, lora)[:count].to(self.dtype) for number, x, lora, count in calls]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def finish(
        self, stage: Stage, numbers: Sequence[int], hidden: Tensor, attended: Tensor
    ) -> Sequence[Tensor]:
        rows, pieces = stage.read(hidden), attended.split(list(stage.sizes))
        dtypes = [self.dtypes[number] for number in numbers]
        calls = zip(numbers, rows, pieces, stage.active, dtypes, strict=True)
        return [
            self.switch.call(lora, self._family.finish, self.blocks[number], x.to(dtype), piece.to(dtype))
            for number, x, piece, lora, dtype in calls
        ]

    def _project(self, number: int, x: Tensor, lora: ActiveLora | None) -> Tensor:
        x = x.to(self.dtypes[number])
        if self._family.norm_before is not None:
            x = getattr(self.blocks[number], self._family.norm_before)(x)
        return self.switch.call(lora, self._projections[number], x)


@torch.inference_mode()
def run_once(
    layers: Layers, number: int, rows: int, hidden_size: int, width: int, device: torch.device
) -> None:
    """Both halves of a layer, on zeros; `width` is that of what attention returns."""
    stage = Stage.of_the_base(rows, device)
    hidden = torch.zeros(rows, hidden_size, dtype=layers.dtype, device=device)
    layers.project(stage, [number], hidden)
    layers.finish(stage, [number], hidden, hidden.new_zeros(rows, width))


def copied(blocks: list[Any], dtype: torch.dtype) -> list[Any]:
    """The blocks once more, in another precision."""
    return [copy.deepcopy(block).to(dtype) for block in blocks]


def _wrap_linear_layers(blocks: Sequence[Any], switch: LoraSwitch) -> dict[str, tuple[int, int]]:
    """Wrap every linear layer of every block; returns their names in a block and (inputs, outputs)."""
    modules: dict[str, tuple[int, int]] = {}
    for number, block in enumerate(blocks):
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear | Conv1D):
                block.set_submodule(name, AdaptedLinear(module, (number, name), switch))
                modules[name] = in_and_out(module)
    return modules
