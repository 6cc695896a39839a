"""The mixture itself: weighted sums of the outputs of own and routed layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from molex.packing import Indices, Packed
from molex.routing import RoutePlan
from molex.weighted_sum import NOWHERE, Terms, WeightedSum


def mix(
    layout: Packed, plan: RoutePlan, own: Tensor, routed: Sequence[Tensor], weighted_sum: WeightedSum
) -> Tensor:
    """z' [m, d] = own · L_t(z) + Σ_visits weight · L_layer(z).

    `own` [m, d] is the output of the own layer on the n ≤ m tokens of `layout`, `routed` those of the layers
    in `plan.groups` on the tokens of their requests. All may have rows of padding behind.
    """
    terms = terms_of(layout, plan, len(own), [len(output) for output in routed])
    return weighted_sum(own, torch.cat(list(routed)) if routed else own[:0], terms)


def terms_of(layout: Packed, plan: RoutePlan, count: int, sizes: Sequence[int]) -> Terms:
    """What `mix` adds up in `count` rows, where the outputs of the routed layers have `sizes` rows."""
    assert plan.own is not None
    device = plan.own.device
    tokens = np.minimum(np.arange(count), layout.num_tokens - 1)
    owners = layout.owners[tokens]
    rows, visits = _visits(layout, plan, sizes, tokens, owners)
    weights = plan.own.new_zeros(rows.shape)
    if plan.weights is not None and len(plan.weights):
        weights = plan.weights[_tensor(np.maximum(visits, 0), device)]
    return Terms(plan.own[_tensor(owners, device)], _tensor(rows, device), weights)


def _visits(
    layout: Packed, plan: RoutePlan, sizes: Sequence[int], tokens: Indices, owners: Indices
) -> tuple[Indices, Indices]:
    """For first and second choices: where each token's routed output lies, and its visit; [choices, m]."""
    if not sizes:
        return np.empty((0, len(tokens)), dtype=np.int64), np.empty((0, len(tokens)), dtype=np.int64)
    visit_of = np.full((int(plan.choices.max()), len(layout)), NOWHERE)
    visit_of[plan.choices - 1, plan.requests] = np.arange(len(plan.requests))
    visits = visit_of.take(owners, axis=1)
    within = tokens - layout.offsets[owners]
    return np.where(visits == NOWHERE, NOWHERE, _visit_starts(layout, plan, sizes)[visits] + within), visits


def _visit_starts(layout: Packed, plan: RoutePlan, sizes: Sequence[int]) -> Indices:
    """The first row of each visit in the outputs of the routed layers side by side."""
    starts, end = [], 0
    for (_, requests, _), size in zip(plan.groups, sizes, strict=True):
        lengths = layout.lengths[requests]
        starts.append(end + lengths.cumsum() - lengths)
        end += size
    return np.concatenate(starts)


def _tensor(indices: Indices, device: torch.device) -> Tensor:
    return torch.from_numpy(indices).to(device)
