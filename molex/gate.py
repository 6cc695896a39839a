"""Gates: from the hidden states of a depth to one logit per layer, for each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from molex.config import Axis

MAX_LOG_TEMPERATURE = math.log(100.0)


class Gate(Protocol):
    """A gate over T layers."""

    def logits(self, hidden: Tensor, lengths: Sequence[int], /) -> Tensor:
        """Logits [n, T] for hidden states [n, d] of requests that lie side by side with these lengths."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """The gate's weights by their names in an adapter file."""
        ...


def gate_logits(
    gates: Sequence[Gate], lengths: Sequence[Sequence[int]], hidden: Tensor, tokens: Tensor
) -> Tensor:
    """Logits [n, T] of the rows `tokens` [n] of the hidden states [m, d].

    They belong to requests side by side; `lengths[i]` lists the lengths of those of `gates[i]`.
    """
    pieces = hidden.index_select(0, tokens).split([sum(numbers) for numbers in lengths])
    return torch.cat(
        [gate.logits(piece, numbers) for gate, numbers, piece in zip(gates, lengths, pieces, strict=True)]
    )


class LinearGate:
    """g(z) = W z + b, with W [T, d] and b [T]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    def logits(self, hidden: Tensor, _lengths: Sequence[int], /) -> Tensor:
        return functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}


class CosineGate:
    """g(z) = normalize(W z + b) · normalize(S) · exp(min(temperature, ln 100)).

    W [P, d], b [P], S [P, T] normalised over P, temperature [1]. The projection is normalised over its
    features; with `axis="sequence"` along the tokens of a request, as the official code does.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, similarity: Tensor, temperature: Tensor, axis: Axis
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.similarity = similarity
        self.temperature = temperature
        self.axis = axis

    def logits(self, hidden: Tensor, lengths: Sequence[int], /) -> Tensor:
        projected = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.axis == "sequence":
            requests = torch.split(projected, list(lengths))
            unit = torch.cat([functional.normalize(request, dim=0) for request in requests])
        else:
            unit = functional.normalize(projected, dim=-1)
        scale = self.temperature.clamp(max=MAX_LOG_TEMPERATURE).exp()
        return unit @ functional.normalize(self.similarity, dim=0) * scale

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            "projector.weight": self.weight,
            "projector.bias": self.bias,
            "similarity": self.similarity,
            "temperature": self.temperature,
        }
