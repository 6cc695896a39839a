"""Packed attention against the softmax formula, one request at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molex.attention import KVPlan, KVStreams, packed_attention
from molex.kv_cache import PAGE_TOKENS, KVCache, pages_for
from molex.packing import Packed

CPU = torch.device("cpu")
KV_HEADS, SIZE = 2, 4


@dataclass
class Case:
    lengths: list[int]
    past: list[int]
    cached: list[bool]
    repeats: int
    window: int | None
    causal: bool
    seed: int = 0


@st.composite
def cases(draw, causal=True):
    """Up to 7 requests: prompts, decoding steps and requests without a cache slot in one batch."""
    count = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 20)), min_size=count, max_size=count))
    cached = draw(st.lists(st.booleans(), min_size=count, max_size=count)) if causal else [False] * count
    past = [draw(st.integers(0, 80)) if kept else 0 for kept in cached]
    window = draw(st.one_of(st.none(), st.integers(1, 6))) if causal else None
    return Case(
        lengths, past, cached, draw(st.sampled_from([1, 3])), window, causal, draw(st.integers(0, 999))
    )


def attention_formula(query, keys, values, first, window, causal, scaling):
    """softmax(q·k · scaling) v of one request: query [q, heads, size], keys, values [k, kv_heads, size]."""
    output = torch.empty_like(query)
    repeats = query.shape[1] // keys.shape[1]
    for i, at in enumerate(range(first, first + len(query))):
        low = 0 if window is None else max(0, at - window + 1)
        seen = slice(low, at + 1) if causal else slice(None)
        for head in range(query.shape[1]):
            shared = head // repeats
            scores = keys[seen, shared] @ query[i, head] * scaling
            output[i, head] = scores.softmax(dim=0) @ values[seen, shared]
    return output


def check(case, dtype=torch.float64, scaling=None, tolerance=1e-10):
    generator = torch.Generator().manual_seed(case.seed)
    whole = [p + n for p, n in zip(case.past, case.lengths, strict=True)]
    keys, values = (
        [torch.randn(n, KV_HEADS, SIZE, generator=generator).to(dtype) for n in whole] for _ in range(2)
    )
    query = torch.randn(sum(case.lengths), KV_HEADS * case.repeats, SIZE, generator=generator).to(dtype)
    packed = Packed(case.lengths, case.past, [0] * len(case.lengths), causal=case.causal, device=CPU)
    kv = cache_with(case, packed, keys, values, dtype) if any(case.cached) else None
    new = [torch.cat([x[p:] for x, p in zip(xs, case.past, strict=True)]) for xs in (keys, values)]

    factor = 1 / math.sqrt(SIZE) if scaling is None else scaling
    output = packed_attention(torch.cat([query, *new], dim=1), KV_HEADS, packed, kv, factor, case.window)

    assert output.dtype == dtype
    assert output.shape == query.shape
    expected = [
        attention_formula(q.double(), k.double(), v.double(), p, case.window, case.causal, factor)
        for q, k, v, p in zip(query.split(case.lengths), keys, values, case.past, strict=True)
    ]
    torch.testing.assert_close(output.double(), torch.cat(expected), atol=tolerance, rtol=tolerance)


def cache_with(case, packed, keys, values, dtype):
    """A cache that holds the earlier tokens, in pages that lie in another order than the tokens."""
    count, each = len(case.lengths), pages_for(100)
    cache = new_cache(count * each, dtype)
    pages = np.random.default_rng(case.seed).permutation(count * each).reshape(count, each)
    pages[~np.array(case.cached)] = -1
    for own, past, k, v in zip(pages, case.past, keys, values, strict=True):
        if past:
            page, token = np.divmod(np.arange(past), PAGE_TOKENS)
            places = torch.from_numpy(np.stack([own[page], token]))
            cache.depths[0].write(places, torch.cat([k[:past], v[:past]], dim=1))
    return KVStreams(cache.depths[0], KVPlan(packed, pages, KV_HEADS))


def new_cache(num_pages, dtype):
    return KVCache(num_pages, num_layers=1, num_heads=KV_HEADS, head_dim=SIZE, dtype=dtype, device=CPU)


@given(cases())
def test_causal_attention_is_the_formula(case):
    check(case)


@given(cases(causal=False))
def test_encoder_attention_is_the_formula(case):
    check(case)


@settings(max_examples=30)
@given(cases())
def test_bfloat16_stays_within_its_rounding(case):
    check(case, torch.bfloat16, tolerance=0.03)


@pytest.mark.parametrize("causal", [True, False])
def test_a_scaling_of_the_model_is_kept(causal):
    check(Case([3, 1, 4], [0, 0, 0], [False] * 3, 3, None, causal), scaling=0.2)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("past", [[0, 0, 0], [5, 0, 9]])
def test_sliding_windows(window, past):
    check(Case([1, 6, 3], past, [True] * 3, 3, window, causal=True))


@pytest.mark.parametrize("cached", [[True, False, True], [True, False, False]])
def test_single_tokens_without_a_slot_run_beside_decoding_ones(cached):
    past = [7, 0, 5 if cached[2] else 0]
    check(Case([1, 1, 1], past, cached, 3, None, causal=True))


def test_new_keys_and_values_are_kept():
    cache = new_cache(2, torch.float32)
    key, value = torch.randn(2, 3, KV_HEADS, SIZE)
    packed = Packed([3], [0], [0], causal=True, device=CPU)
    heads = torch.cat([key, key, value], dim=1)
    kv = KVStreams(cache.depths[0], KVPlan(packed, np.array([[1]]), KV_HEADS))
    packed_attention(heads, KV_HEADS, packed, kv, scaling=1.0)
    assert torch.equal(cache.depths[0].pages[1, :, :3], torch.cat([key, value], dim=1).transpose(0, 1))
    assert not cache.depths[0].pages[0].any()


@pytest.mark.parametrize("lengths", [[3, 20, 18], [5]])
def test_chosen_rows_are_those_of_all(lengths):
    heads = torch.randn(sum(lengths), 3 * KV_HEADS, SIZE)
    packed = Packed(lengths, [0] * len(lengths), [0] * len(lengths), causal=False, device=CPU)
    rows = np.array([sum(lengths) - 1, 0, 0, 2])
    every, chosen = (
        packed_attention(heads, KV_HEADS, packed, None, 1.0, rows=which) for which in (None, rows)
    )
    assert torch.equal(chosen, every[rows])
