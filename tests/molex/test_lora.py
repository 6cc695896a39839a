"""The three forms of the low-rank update are one operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from molex import lora
from molex.lora import (
    ActiveLora,
    AdaptedLinear,
    BatchLora,
    LoraSwitch,
    LoraWeights,
    LowRank,
    low_rank_reference,
    low_rank_segments,
)
from molex.packing import Packed

IN, OUT = 6, 5
SITE, OTHER_SITE = (0, "query"), (1, "query")
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
# How the engine may compute a batch: what it thinks a call costs decides how wide the blocks are.
FORMS = {"one block": 10**12, "some blocks": 300, "a block each": 0}


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(rank, seed, dtype=torch.float64, scaling=1.5):
    return LowRank(
        randn(rank, IN, seed=seed, dtype=dtype), randn(OUT, rank, seed=seed + 1, dtype=dtype), scaling
    )


def pack(lengths, members):
    return Packed(lengths, [0] * len(lengths), members, causal=False, device=torch.device("cpu"))


def all_segments(packed):
    return packed.segments(np.arange(len(packed)))


@st.composite
def batches(draw):
    """Rows per adapter and ranks; None for an adapter that leaves the site alone."""
    ranks = draw(st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=6))
    rows = draw(st.lists(st.integers(1, 7), min_size=len(ranks), max_size=len(ranks)))
    return list(zip(ranks, rows, strict=True))


def build(batch, dtype):
    """y, x, the packed rows, the adapters and the segments of a batch."""
    weights = [
        LoraWeights({} if rank is None else {SITE: low_rank(rank, seed=10 * n, dtype=dtype, scaling=0.5 + n)})
        for n, (rank, _) in enumerate(batch)
    ]
    packed = pack([rows for _, rows in batch], list(range(len(batch))))
    segments = [
        (weights[m].updates[SITE], start, stop) for m, start, stop in all_segments(packed) if batch[m][0]
    ]
    n = packed.num_tokens
    return randn(n, OUT, seed=1, dtype=dtype), randn(n, IN, seed=2, dtype=dtype), packed, weights, segments


def by_sentence(y, x, segments):
    """The docstring's equation with nothing but Python sums."""
    result = y.tolist()
    for update, start, stop in segments:
        change = (update.scaling * update.b @ update.a).tolist()
        for i in range(start, stop):
            for o in range(OUT):
                result[i][o] += sum(change[o][k] * x[i, k].item() for k in range(IN))
    return torch.tensor(result, dtype=y.dtype)


@given(batches())
def test_the_reference_is_the_equation(batch):
    y, x, _, _, segments = build(batch, torch.float64)
    torch.testing.assert_close(low_rank_reference(y, x, segments), by_sentence(y, x, segments))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@given(batch=batches())
def test_segments_equal_the_reference(dtype, batch):
    y, x, _, _, segments = build(batch, dtype)
    expected = low_rank_reference(y, x, segments)
    tolerance = {"atol": EXACT[dtype] * 100, "rtol": EXACT[dtype]}
    torch.testing.assert_close(low_rank_segments(y, x, segments), expected, **tolerance)


def test_no_segments_change_nothing():
    y, x = randn(3, OUT, seed=1), randn(3, IN, seed=2)
    for form in (low_rank_reference, low_rank_segments):
        assert torch.equal(form(y.clone(), x, []), y)


def active(packed, weights):
    return ActiveLora(BatchLora(weights), all_segments(packed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@given(batch=batches())
def test_the_batch_equals_the_reference_in_any_form(form, dtype, batch):
    y, x, packed, weights, segments = build(batch, dtype)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(lora, "OPERATIONS_PER_CALL", FORMS[form])
        result = active(packed, weights).add(y.clone(), x, SITE)
    expected = low_rank_reference(y, x, segments)
    torch.testing.assert_close(result, expected, atol=EXACT[dtype] * 100, rtol=EXACT[dtype])


@pytest.mark.parametrize("form", FORMS)
@given(batch=batches())
def test_bfloat16_rows_are_rounded_once(form, batch):
    _, _, packed, weights, segments = build(batch, torch.float32)
    y = randn(packed.num_tokens, OUT, seed=1).bfloat16()
    x = randn(packed.num_tokens, IN, seed=2).bfloat16()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(lora, "OPERATIONS_PER_CALL", FORMS[form])
        result = active(packed, weights).add(y.clone(), x, SITE)
    assert result.dtype == torch.bfloat16
    update = low_rank_reference(torch.zeros_like(y, dtype=torch.float32), x.float(), segments)
    # The update is exact up to its one rounding to 8 bits, and so is the sum.
    step = 2.0**-8 * (update.abs() + (y.float() + update).abs()) + 1e-3
    assert ((result.float() - (y.float() + update)).abs() <= step).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_adapter_may_stand_in_several_places_and_others_between(form, monkeypatch):
    monkeypatch.setattr(lora, "OPERATIONS_PER_CALL", FORMS[form])
    shared, other = LoraWeights({SITE: low_rank(2, seed=1)}), LoraWeights({SITE: low_rank(3, seed=5)})
    packed = pack([1, 2, 1, 1], [0, 0, 1, 2])
    y, x = randn(5, OUT, seed=1), randn(5, IN, seed=2)
    with torch.no_grad():
        result = active(packed, [shared, other, LoraWeights()]).add(y.clone(), x, SITE)
    expected = low_rank_reference(y, x, [(shared.updates[SITE], 0, 3), (other.updates[SITE], 3, 4)])
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[4], y[4])


@pytest.mark.parametrize("grad", [False, True])
def test_a_site_that_no_adapter_has_is_left_alone(grad):
    packed = pack([2], [0])
    y = randn(2, OUT, seed=1)
    with torch.set_grad_enabled(grad):
        result = active(packed, [LoraWeights({SITE: low_rank(2, seed=1)})]).add(
            y.clone(), randn(2, IN, seed=2), OTHER_SITE
        )
    assert torch.equal(result, y)


@given(batch=batches())
def test_gradients_equal_those_of_the_reference(batch):
    y, x, packed, weights, segments = build(batch, torch.float64)
    leaves = [t for w in weights for u in w.updates.values() for t in (u.a, u.b)]
    leaves = [t.requires_grad_() for t in (*leaves, x, y)]
    direction = randn(*y.shape, seed=3)
    result = active(packed, weights).add(y, x, SITE)
    expected = torch.zeros_like(y) + y
    for update, start, stop in segments:
        change = update.scaling * (x[start:stop] @ update.a.T @ update.b.T)
        expected = expected + torch.nn.functional.pad(change, (0, 0, start, len(y) - stop))
    torch.testing.assert_close(result, expected)
    for ours, theirs in zip(
        torch.autograd.grad((result * direction).sum(), leaves, materialize_grads=True),
        torch.autograd.grad((expected * direction).sum(), leaves, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_what_overflows_in_one_adapter_stays_there(form, monkeypatch):
    monkeypatch.setattr(lora, "OPERATIONS_PER_CALL", FORMS[form])
    tame, wild = low_rank(2, seed=1, dtype=torch.float32), low_rank(2, seed=5, dtype=torch.float32)
    wild = LowRank(wild.a.sign() * 3e38, wild.b, wild.scaling)
    packed = pack([2, 2, 2], [0, 1, 2])
    y = randn(6, OUT, seed=1, dtype=torch.float32)
    x = 2 + randn(6, IN, seed=2, dtype=torch.float32).abs()
    weights = [LoraWeights({SITE: update}) for update in (tame, wild, tame)]
    with torch.no_grad():
        result = active(packed, weights).add(y.clone(), x, SITE)
    kept = [0, 1, 4, 5]
    expected = low_rank_reference(y, x, [(tame, 0, 2), (tame, 4, 6)])
    assert not result[2:4].isfinite().any()
    torch.testing.assert_close(result[kept], expected[kept])


def test_factors_in_training_are_read_anew():
    update = low_rank(2, seed=1)
    update.a.requires_grad_()
    batch, packed = BatchLora([LoraWeights({SITE: update})]), pack([3], [0])
    y, x = randn(3, OUT, seed=1), randn(3, IN, seed=2)
    with torch.no_grad():
        for _ in range(2):
            result = ActiveLora(batch, all_segments(packed)).add(y.clone(), x, SITE)
            torch.testing.assert_close(result, low_rank_reference(y, x, [(update, 0, 3)]))
            update.a.mul_(2)


def test_dropout_acts_on_the_inputs_in_training_only():
    weights = [LoraWeights({SITE: low_rank(2, seed=1)}, dropout=0.5)]
    packed = pack([40], [0])
    y, x = torch.zeros(40, OUT, dtype=torch.float64), randn(40, IN, seed=2)
    kept = active(packed, [LoraWeights(weights[0].updates)]).add(y, x, SITE)
    torch.manual_seed(0)
    assert not torch.allclose(active(packed, weights).add(y, x, SITE), kept)
    with torch.no_grad():
        torch.testing.assert_close(active(packed, weights).add(y.clone(), x, SITE), kept)


def test_an_adapted_linear_is_its_base_unless_switched_on():
    switch = LoraSwitch()
    linear = AdaptedLinear(nn.Linear(IN, OUT, dtype=torch.float64), SITE, switch)
    x = randn(3, IN, seed=1)
    with torch.no_grad():
        base = linear.base(x)
        assert torch.equal(linear(x), base)
        update = low_rank(2, seed=1)
        switch.active = active(pack([3], [0]), [LoraWeights({SITE: update})])
        torch.testing.assert_close(linear(x), base + update.scaling * (x @ update.a.T @ update.b.T))
