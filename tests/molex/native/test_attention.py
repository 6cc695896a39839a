"""Attention on the kernels against PyTorch's, over packed requests of any lengths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex.attention import packed_attention
from molex.packing import Packed
from tests.molex.native.kernels import CPU, needs_kernels, threads

pytestmark = needs_kernels
# The kernels compute in float32 and round once; PyTorch's reference runs in float64.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def attend(heads, kv_heads, lengths, scaling, causal, window):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.ops.molex.attend(heads, offsets, kv_heads, scaling, causal, window or 0)


def check(lengths, kv_heads, repeats, size, causal, window, dtype, factor=1.0):
    torch.manual_seed(sum(lengths))
    heads = (torch.randn(sum(lengths), kv_heads * (repeats + 2), size) * factor).to(dtype)
    scaling = 1 / math.sqrt(size)
    packed = Packed(lengths, [0] * len(lengths), [0] * len(lengths), causal=causal, device=CPU)
    expected = packed_attention(heads.double(), kv_heads, packed, None, scaling, window)
    given = attend(heads, kv_heads, lengths, scaling, causal, window)
    assert given.dtype == dtype
    tolerance = TOLERANCE[dtype] * factor
    torch.testing.assert_close(given.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    size=st.sampled_from([1, 4, 6, 30, 64]),
    window=st.one_of(st.none(), st.integers(1, 150)),
)
def test_it_is_pytorchs(dtype, causal, lengths, kv_heads, repeats, size, window):
    check(lengths, kv_heads, repeats, size, causal, window if causal else None, dtype)


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_threads_gives_the_same(count):
    with threads(count):
        check([1000, 3, 64, 65], 2, 3, 16, causal=True, window=None, dtype=torch.float32)


def test_scores_too_large_for_exp_are_no_trouble():
    check([70, 5], 1, 1, 8, causal=False, window=None, dtype=torch.float32, factor=30.0)


def test_a_token_that_is_not_finite_spoils_its_own_request_alone():
    heads = torch.randn(10, 3, 8)
    heads[2] = math.nan
    output = attend(heads, 1, [5, 5], 1.0, causal=False, window=None)
    assert output[:5].isnan().all()
    assert output[5:].isfinite().all()


@pytest.mark.parametrize("offsets", [[0, 5], [1, 10], [0, 11], [0, 7, 5, 10], [0, 12, 10]])
def test_offsets_that_do_not_cover_the_tokens_are_refused(offsets):
    with pytest.raises(RuntimeError, match="offsets must run"):
        torch.ops.molex.attend(torch.zeros(10, 3, 8), torch.tensor(offsets), 1, 1.0, False, 0)


@pytest.mark.parametrize("kv_heads", [-1, 0, 2])
def test_heads_that_cannot_be_shared_are_refused(kv_heads):
    with pytest.raises(RuntimeError, match="heads"):
        torch.ops.molex.attend(torch.zeros(10, 7, 8), torch.tensor([0, 10]), kv_heads, 1.0, False, 0)
