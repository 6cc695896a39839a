"""The weights of all blocks of a base, stacked by what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from molex.grouped.rows import LayerRows
from molex.prepack import weight_and_bias


class StackedLinear:
    """One linear layer of every block, or several with the same input, whose outputs lie side by side.

    `weight` is [T, out, in], `bias` [T, out] or None.
    """

    def __init__(self, blocks: Sequence[Any], names: Sequence[str]) -> None:
        """Copies the weights of the modules `names`, which `AdaptedLinear` wraps."""
        pairs = [[weight_and_bias(block.get_submodule(name).base) for name in names] for block in blocks]
        self.weight = torch.stack([torch.cat([weight for weight, _ in block]) for block in pairs])
        biases = [[bias for _, bias in block if bias is not None] for block in pairs]
        self.bias = torch.stack([torch.cat(block) for block in biases]) if biases[0] else None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, rows: LayerRows) -> Tensor:
        """[m, in] → [m, out]."""
        return rows.linear(x, self.weight, self.bias)


class StackedNorm:
    """One norm of every block: a LayerNorm, or an RMSNorm where it has no bias."""

    def __init__(self, blocks: Sequence[Any], name: str) -> None:
        modules = [block.get_submodule(name) for block in blocks]
        first: Any = modules[0]
        self.eps = float(first.eps if isinstance(first, nn.LayerNorm) else first.variance_epsilon)
        self.weight = torch.stack([module.weight.detach() for module in modules])
        has_bias = isinstance(first, nn.LayerNorm)
        self.bias = torch.stack([module.bias.detach() for module in modules]) if has_bias else None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, rows: LayerRows) -> Tensor:
        """Each row of x [m, d] with the weight and bias of its layer: [m, d]."""
        layer, shape = rows.layer, x.shape[-1:]
        if layer is not None and self.bias is not None:
            return functional.layer_norm(x, shape, self.weight[layer], self.bias[layer], self.eps)
        if layer is not None:
            return functional.rms_norm(x, shape, self.weight[layer], self.eps)
        weight = rows.of_rows(self.weight)
        if self.bias is None:
            # Rounded before the weight and behind it, as transformers does.
            return functional.rms_norm(x, shape, eps=self.eps) * weight
        # Rounded once, at the end, as where one kernel does all of it.
        normed = functional.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), shape, eps=self.eps)
        return torch.addcmul(rows.of_rows(self.bias), normed, weight).to(x.dtype)
