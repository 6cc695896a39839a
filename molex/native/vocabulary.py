"""The product with a vocabulary on the kernels, and an embedding that shares its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molex.native.weights import pack


class NativeVocabulary(nn.Module):
    """The language model head with packed weights: hidden states [..., d] → logits [..., V]. No gradients."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        linear = pack([head], [0], gated=False, bits=None)
        self.nbytes = linear.nbytes
        self.packed = torch.classes.molex.Vocabulary(linear.tensors, linear.inputs)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2).contiguous()
        return self.packed.logits(rows).unflatten(0, hidden.shape[:-1])  # type: ignore[no-any-return]


class NativeEmbedding(nn.Module):
    """The embedding of a base whose head has the same weights: they are in memory once."""

    def __init__(self, vocabulary: NativeVocabulary) -> None:
        super().__init__()
        self._packed = vocabulary.packed

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] → [..., d]."""
        return self._packed.embed(tokens.flatten()).unflatten(0, tokens.shape)  # type: ignore[no-any-return]
