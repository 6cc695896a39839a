"""What each row of a mixture is the weighted sum of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# The float32 sums of so many rows fit the cache of one core.
ROWS_PER_STEP = 256
NOWHERE = -1


@dataclass(frozen=True)
class Terms:
    """What is added up in each row: z'[i] = own[i] · L_t(z)[i] + Σ_c weights[c, i] · routed[rows[c, i]].

    `own` is [m], `rows` and `weights` are [choices, m]. Where a row is `NOWHERE`, a request makes no visit.
    """

    own: Tensor
    rows: Tensor
    weights: Tensor


class WeightedSum(Protocol):
    """Own outputs [m, d], routed ones side by side [k, d] and the terms → the sums [m, d]."""

    def __call__(self, own: Tensor, routed: Tensor, terms: Terms, /) -> Tensor: ...


def summed_in_steps(own: Tensor, routed: Tensor, terms: Terms) -> Tensor:
    """The `WeightedSum` of PyTorch's own operations, differentiable in all but the rows."""
    # The last row is for requests without a visit: any other could hold a NaN of its own.
    outputs = torch.cat([routed, routed.new_zeros(1, own.shape[1])])
    rows = torch.where(terms.rows == NOWHERE, len(routed), terms.rows)
    mixed = []
    for first in range(0, len(own), ROWS_PER_STEP):
        step = slice(first, first + ROWS_PER_STEP)
        # In at least float32: 0.95 and 0.05 rounded to bfloat16 no longer sum to 1.
        total = own[step].to(terms.own.dtype) * terms.own[step, None]
        for chosen, weights in zip(rows, terms.weights, strict=True):
            # Gathered by token: adding at tokens would go row by row.
            output = outputs.index_select(0, chosen[step])
            total.addcmul_(output.to(total.dtype), weights[step, None])
        mixed.append(total.to(own.dtype))
    return torch.cat(mixed)
