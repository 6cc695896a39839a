"""Mixing the outputs of layers, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex.mixing import mix
from molex.packing import Packed
from molex.plan import RoutePlan
from tests.molex.native.kernels import needs_kernels

CPU = torch.device("cpu")
WIDTH = 3


@st.composite
def batches(draw):
    """Lengths of up to 6 requests and, for each, none, one or two layers that it visits."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    pairs = st.lists(st.integers(0, 3), max_size=2, unique=True)
    return lengths, draw(st.lists(pairs, min_size=len(lengths), max_size=len(lengths)))


def mix_natively(layout, plan, outputs):
    visits = torch.from_numpy(plan.requests.copy())
    return torch.ops.molex.mix(torch.cat(outputs), layout.bounds, plan.own, visits, plan.weights)


MIXTURES = [mix, pytest.param(mix_natively, marks=needs_kernels)]


def plan_of(chosen, generator, dtype=torch.float32):
    visits = sorted((layer, i, n) for i, layers in enumerate(chosen) for n, layer in enumerate(layers, 1))
    layers, requests, choices = np.array(visits, dtype=np.int64).reshape(-1, 3).T
    own, weights = (torch.rand(n, generator=generator, dtype=dtype) for n in (len(chosen), len(visits)))
    return RoutePlan(own, layers, requests, choices, weights)


@pytest.mark.parametrize("mix", MIXTURES)
@given(batch=batches(), seed=st.integers(0, 99))
def test_the_mixture_is_the_weighted_sum(mix, batch, seed):
    lengths, chosen = batch
    generator = torch.Generator().manual_seed(seed)
    layout = Packed(lengths, [0] * len(lengths), [0] * len(lengths), causal=False, device=CPU)
    plan = plan_of(chosen, generator)
    own = torch.randn(layout.num_tokens, WIDTH, generator=generator)
    routed = [
        torch.randn(sum(lengths[i] for i in requests), WIDTH, generator=generator)
        for _, requests, _ in plan.groups
    ]
    expected = own[: layout.num_tokens] * plan.own[layout.owners][:, None]
    weights = iter(plan.weights)
    for (_, requests, _), output in zip(plan.groups, routed, strict=True):
        first = 0
        for i in requests:
            expected[layout.tokens(np.array([i]))] += next(weights) * output[first : first + lengths[i]]
            first += lengths[i]
    torch.testing.assert_close(mix(layout, plan, [own, *routed]), expected)


def test_rows_of_padding_may_hold_anything():
    layout = Packed([2, 1], [0, 0], [0, 0], causal=False, device=CPU)
    plan = plan_of([[1], [1, 2]], torch.Generator().manual_seed(0))
    outputs = [torch.randn(n, WIDTH) for n in (3, 3, 1)]
    padded = [torch.cat([output, torch.full((2, WIDTH), math.nan)]) for output in outputs]
    mixed = mix(layout, plan, padded)
    assert len(mixed) == 5
    assert torch.equal(mixed[:3], mix(layout, plan, outputs))


@pytest.mark.parametrize("mix", MIXTURES)
def test_a_request_without_a_visit_is_untouched_by_what_others_got(mix):
    layout = Packed([2, 1], [0, 0], [0, 0], causal=False, device=CPU)
    plan = plan_of([[1], []], torch.Generator().manual_seed(0))
    mixed = mix(layout, plan, [torch.ones(3, WIDTH), torch.full((2, WIDTH), math.nan)])
    assert mixed[:2].isnan().all()
    assert (mixed[2] == plan.own[1]).all()


@pytest.mark.parametrize("mix", MIXTURES)
def test_bfloat16_is_rounded_once(mix):
    layout = Packed([1], [0], [0], causal=False, device=CPU)
    plan = RoutePlan(torch.tensor([0.95]), *np.array([[1], [0], [1]]), torch.tensor([0.05]))
    ones = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    # 0.95 and 0.05 rounded to bfloat16 sum to less than 1.
    mixed = mix(layout, plan, [ones, ones])
    assert torch.equal(mixed, ones)
    assert mixed.dtype == torch.bfloat16


def test_gradients_reach_outputs_and_weights():
    layout = Packed([2, 1], [0, 0], [0, 0], causal=False, device=CPU)
    plan = plan_of([[1], [1, 2]], torch.Generator().manual_seed(0), torch.float64)
    leaves = [plan.own, plan.weights, *(torch.randn(n, WIDTH, dtype=torch.float64) for n in (3, 3, 1))]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(own_weights, weights, *outputs):
        given = RoutePlan(own_weights, plan.layers, plan.requests, plan.choices, weights)
        return mix(layout, given, outputs)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("mix", MIXTURES)
@pytest.mark.parametrize("count", [1, 2])
def test_where_nobody_visits_only_the_own_weight_counts(count, mix):
    layout = Packed([1] * count, [0] * count, [0] * count, causal=False, device=CPU)
    plan = plan_of([[]] * count, torch.Generator().manual_seed(1))
    mixed = mix(layout, plan, [torch.ones(count, WIDTH)])
    torch.testing.assert_close(mixed, plan.own[:, None].expand(count, WIDTH))
