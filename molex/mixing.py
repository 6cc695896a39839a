"""The mixture itself: weighted sums of the outputs of own and routed layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from molex.packing import Indices, Packed
from molex.plan import RoutePlan

# The float32 sums of so many rows fit the cache of one core.
ROWS_PER_STEP = 256
NOWHERE = -1


def mix(layout: Packed, plan: RoutePlan, outputs: Sequence[Tensor]) -> Tensor:
    """z' [m, d] = own · L_t(z) + Σ_visits weight · L_layer(z), differentiable in outputs and weights.

    `outputs` are that of the own layer [m, d] on the n ≤ m tokens of `layout`, then those of the layers in
    `plan.groups` on the tokens of their requests. All may have rows of padding behind.
    """
    assert plan.own is not None
    own, *routed = outputs
    tokens = np.minimum(np.arange(len(own)), layout.num_tokens - 1)
    owners = layout.owners[tokens]
    rows, visits = _visits(layout, plan, [len(output) for output in routed], tokens, owners)
    weights = plan.own.new_zeros(rows.shape)
    if plan.weights is not None and len(plan.weights):
        weights = plan.weights[_tensor(np.maximum(visits, 0), own)]
    # The last row is for requests without a visit: any other could hold a NaN of its own.
    others = torch.cat([*routed, own.new_zeros(1, own.shape[1])])
    return _summed(own, plan.own[_tensor(owners, own)], others, _tensor(rows, own), weights)


def _visits(
    layout: Packed, plan: RoutePlan, sizes: Sequence[int], tokens: Indices, owners: Indices
) -> tuple[Indices, Indices]:
    """For first and second choices: where each token's routed output lies, and its visit; [choices, m]."""
    if not sizes:
        return np.empty((0, len(tokens)), dtype=np.int64), np.empty((0, len(tokens)), dtype=np.int64)
    visit_of = np.full((int(plan.choices.max()), len(layout)), NOWHERE)
    visit_of[plan.choices - 1, plan.requests] = np.arange(len(plan.requests))
    visits = visit_of.take(owners, axis=1)
    rows = _visit_starts(layout, plan, sizes)[visits] + tokens - layout.offsets[owners]
    return np.where(visits == NOWHERE, sum(sizes), rows), visits


def _visit_starts(layout: Packed, plan: RoutePlan, sizes: Sequence[int]) -> Indices:
    """The first row of each visit in the outputs of the routed layers side by side."""
    starts, end = [], 0
    for (_, requests, _), size in zip(plan.groups, sizes, strict=True):
        lengths = layout.lengths[requests]
        starts.append(end + lengths.cumsum() - lengths)
        end += size
    return np.concatenate(starts)


def _summed(own: Tensor, own_weights: Tensor, others: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """own_weights[i] · own[i] + Σ_c weights[c, i] · others[rows[c, i]] for the rows i of own [m, d]."""
    mixed = []
    for first in range(0, len(own), ROWS_PER_STEP):
        step = slice(first, first + ROWS_PER_STEP)
        # In at least float32: 0.95 and 0.05 rounded to bfloat16 no longer sum to 1.
        total = own[step].to(own_weights.dtype) * own_weights[step, None]
        for chosen, factors in zip(rows, weights, strict=True):
            # Gathered by token: adding at tokens would go row by row.
            output = others.index_select(0, chosen[step])
            total.addcmul_(output.to(total.dtype), factors[step, None])
        mixed.append(total.to(own.dtype))
    return torch.cat(mixed)


def _tensor(indices: Indices, like: Tensor) -> Tensor:
    return torch.from_numpy(indices).to(like.device)
