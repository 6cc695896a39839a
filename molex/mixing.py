"""The mixture itself: weighted sums of the outputs of own and routed layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from molex.packing import Indices, Packed
from molex.routing import RoutePlan

# The float32 sums of so many rows fit the cache of one core.
ROWS_PER_STEP = 256


def mix(layout: Packed, plan: RoutePlan, own: Tensor, routed: Sequence[Tensor]) -> Tensor:
    """z' [m, d] = own · L_t(z) + Σ_visits weight · L_layer(z).

    `own` [m, d] is the output of the own layer on the n ≤ m tokens of `layout`, `routed` those of the layers
    in `plan.groups` on the tokens of their requests. All may have rows of padding behind.
    """
    assert plan.own is not None
    tokens = np.minimum(np.arange(len(own)), layout.num_tokens - 1)
    owners = layout.owners[tokens]
    own_weights = plan.own[_tensor(owners, own), None]
    # The last row is for requests without a visit: any other could hold a NaN of its own.
    outputs = torch.cat([*routed, routed[0].new_zeros(1, own.shape[1])]) if routed else own
    visits = list(_visits(layout, plan, routed, tokens, owners))
    mixed = []
    for first in range(0, len(own), ROWS_PER_STEP):
        step = slice(first, first + ROWS_PER_STEP)
        # In at least float32: 0.95 and 0.05 rounded to bfloat16 no longer sum to 1.
        total = own[step].to(plan.own.dtype) * own_weights[step]
        for rows, weights in visits:
            # Gathered by token: adding at tokens would go row by row.
            output = outputs.index_select(0, rows[step])
            total.addcmul_(output.to(total.dtype), weights[step])
        mixed.append(total.to(own.dtype))
    return torch.cat(mixed)


def _visits(
    layout: Packed, plan: RoutePlan, routed: Sequence[Tensor], tokens: Indices, owners: Indices
) -> Iterator[tuple[Tensor, Tensor]]:
    """For first and second choices: where the routed output of each token [m] lies, and its weight [m, 1]."""
    if not routed:
        return
    assert plan.weights is not None
    weights = torch.cat([plan.weights, plan.weights.new_zeros(1)])
    starts, nowhere = _visit_starts(layout, plan, routed)
    within = tokens - layout.offsets[owners]
    for choice in range(1, int(plan.choices.max()) + 1):
        visit_of = np.full(len(layout), len(starts))
        visits = np.flatnonzero(plan.choices == choice)
        visit_of[plan.requests[visits]] = visits
        visit = visit_of[owners]
        rows = np.where(visit < len(starts), np.append(starts, 0)[visit] + within, nowhere)
        yield _tensor(rows, weights), weights[_tensor(visit, weights), None]


def _visit_starts(layout: Packed, plan: RoutePlan, routed: Sequence[Tensor]) -> tuple[Indices, int]:
    """The first row of each visit in the outputs of the routed layers side by side, and their end."""
    starts, end = [], 0
    for (_, requests, _), output in zip(plan.groups, routed, strict=True):
        lengths = layout.lengths[requests]
        starts.append(end + lengths.cumsum() - lengths)
        end += len(output)
    return np.concatenate(starts), end


def _tensor(indices: Indices, like: Tensor) -> Tensor:
    return torch.from_numpy(indices).to(like.device)
