"""The layers of a base model in one precision, each in two halves with attention between them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molex.family import Family
from molex.lora import ActiveLora, AdaptedLinear, LoraSwitch
from molex.prepack import can_prepack, in_and_out, padded_rows
from molex.projections import Projections


class Layers:
    """The T blocks of a transformers model, whose linear layers add the low-rank updates of the batch.

    `modules` gives the linear layers of a block and their (inputs, outputs).
    """

    def __init__(self, blocks: list[Any], family: Family) -> None:
        self.blocks = blocks
        self.switch = LoraSwitch()
        self.modules = _wrap_linear_layers(blocks, self.switch)
        self._family = family
        self._projections = [
            Projections([block.get_submodule(name) for name in family.projections]) for block in blocks
        ]
        self._prepacked = False

    @property
    def dtype(self) -> torch.dtype:
        return next(self.blocks[0].parameters()).dtype  # type: ignore[no-any-return]

    def prepack(self) -> None:
        """Lay the weights out for inference (`molex/prepack.py`); no gradients afterwards."""
        device = next(self.blocks[0].parameters()).device
        if self._prepacked or not can_prepack(self.dtype, device):
            return
        self._prepacked = True
        for block, projections in zip(self.blocks, self._projections, strict=True):
            projections.prepack()
            for module in block.modules():
                if isinstance(module, AdaptedLinear) and module not in projections.modules:
                    module.prepack()

    def padded_rows(self, rows: int) -> int:
        """How many rows to hand to `project` and `finish` for `rows`; the others may hold anything."""
        return padded_rows(rows) if self._prepacked else rows

    def compiled_sizes(self, max_rows: int) -> list[int]:
        """The numbers of rows up to `max_rows` that kernels are compiled for, one by one at first use."""
        return sorted({padded_rows(rows) for rows in range(1, max_rows + 1)}) if self._prepacked else []

    def project(self, layer: int, x: Tensor, lora: ActiveLora | None) -> Tensor:
        """The first half of a layer: its input x [n, d] → queries, keys and values side by side [n, e]."""
        if self._family.norm_before is not None:
            x = getattr(self.blocks[layer], self._family.norm_before)(x)
        return self.switch.call(lora, self._projections[layer], x)

    def finish(self, layer: int, x: Tensor, attended: Tensor, lora: ActiveLora | None) -> Tensor:
        """The second half: the input [n, d] and what attention returned → the layer's output [n, d]."""
        return self.switch.call(lora, self._family.finish, self.blocks[layer], x, attended)


def copied(blocks: list[Any], dtype: torch.dtype) -> list[Any]:
    """The blocks once more, in another precision."""
    return [copy.deepcopy(block).to(dtype) for block in blocks]


def _wrap_linear_layers(blocks: list[Any], switch: LoraSwitch) -> dict[str, tuple[int, int]]:
    """Wrap every linear layer of every block; returns their names in a block and (inputs, outputs)."""
    modules: dict[str, tuple[int, int]] = {}
    for number, block in enumerate(blocks):
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear | Conv1D):
                block.set_submodule(name, AdaptedLinear(module, (number, name), switch))
                modules[name] = in_and_out(module)
    return modules
