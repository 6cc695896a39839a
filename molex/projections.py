"""The linear layers before attention, as one where no gradients are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from molex.lora import AdaptedLinear
from molex.prepack import PrepackedLinear, in_and_out


class Projections:
    """From the input x [n, d] of a block's projections to queries, keys and values side by side [n, e]."""

    def __init__(self, modules: Sequence[AdaptedLinear]) -> None:
        self.modules = modules
        self._fused: PrepackedLinear | None = None
        self._widths: list[int] = []

    def prepack(self) -> None:
        """Run them as one layer from now on: one wide product takes less time than several."""
        bases = [module.base for module in self.modules]
        self._fused = PrepackedLinear(*bases)
        self._widths = [in_and_out(base)[1] for base in bases]
        for module in self.modules:
            module.base = nn.Identity()  # The fused layer has the weights.

    def __call__(self, x: Tensor) -> Tensor:
        if self._fused is None:
            return torch.cat([module(x) for module in self.modules], dim=-1)
        y: Tensor = self._fused(x)
        for module, part in zip(self.modules, y.split(self._widths, dim=-1), strict=True):
            adapted = module.adapted(part, x)
            if adapted is not part:
                part.copy_(adapted)
        return y
