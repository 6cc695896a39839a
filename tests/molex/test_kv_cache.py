"""Pages of keys and values: who has which, and what is in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex.errors import MolexError
from molex.kv_cache import PAGE_TOKENS, CacheFullError, KVCache, pages_for

HEADS, SIZE, PAGES = 2, 4, 12


def new_cache(num_pages=PAGES):
    options = {"num_heads": HEADS, "head_dim": SIZE, "dtype": torch.float32, "device": torch.device("cpu")}
    return KVCache(num_pages, num_layers=2, **options)


def write(cache, slot, stream, length, seed):
    """Fill a stream at depth 0; returns what was written [length, 2 · heads, size]."""
    kv = torch.randn(length, 2 * HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
    pages, tokens = np.divmod(np.arange(length), PAGE_TOKENS)
    places = torch.from_numpy(np.stack([slot.pages[stream][pages], tokens]))
    cache.depths[0].write(places, kv)
    return kv


def read(cache, slot, stream):
    heads = slot.pages[stream] * 2 * HEADS + np.arange(2 * HEADS)[:, None]
    return cache.depths[0].read(torch.from_numpy(heads[None]))[0].transpose(0, 1)


@pytest.mark.parametrize(("tokens", "streams", "pages"), [(1, 1, 1), (16, 1, 1), (17, 2, 4), (0, 3, 0)])
def test_streams_take_whole_pages(tokens, streams, pages):
    assert pages_for(tokens, streams) == pages


@given(st.lists(st.one_of(st.tuples(st.integers(1, 70), st.integers(1, 3)), st.integers(0, 9)), max_size=40))
def test_no_page_is_in_two_slots_and_all_come_back(actions):
    """A pair asks for tokens and streams, a number gives the slot at that place back."""
    cache, slots = new_cache(), []
    for action in actions:
        if isinstance(action, int):
            if action < len(slots):
                cache.free(slots.pop(action))
            continue
        if pages_for(*action) > cache.num_free:
            with pytest.raises(CacheFullError):
                cache.allocate(*action)
            continue
        slots.append(cache.allocate(*action))
        assert slots[-1].num_streams == action[1]
        assert slots[-1].max_length >= action[0]
    taken = [page for slot in slots for page in slot.pages.ravel().tolist()]
    assert len(set(taken)) == len(taken) == PAGES - cache.num_free
    assert all(0 <= page < PAGES for page in taken)
    for slot in slots:
        cache.free(slot)
    assert cache.num_free == PAGES


def test_what_does_not_fit_and_what_was_given_back_are_named():
    cache = new_cache()
    slot = cache.allocate(10 * PAGE_TOKENS)
    with pytest.raises(CacheFullError, match="33 tokens need 3 pages; 2 are free"):
        cache.allocate(33)
    cache.free(slot)
    with pytest.raises(MolexError, match="not allocated"):
        cache.free(slot)


def test_what_is_written_is_read_back_and_streams_are_kept_apart():
    cache = new_cache()
    cache.free(cache.allocate(5))  # Pages 0, …, then others in front of them: no slot is one run.
    slots = [cache.allocate(20 + n, 2) for n in range(3)]
    cache.free(slots.pop(0))
    slots.append(cache.allocate(60))
    streams = [(slot, stream) for slot in slots for stream in range(slot.num_streams)]
    written = [write(cache, slot, stream, 18, seed=n) for n, (slot, stream) in enumerate(streams)]
    for (slot, stream), expected in zip(streams, written, strict=True):
        assert torch.equal(read(cache, slot, stream)[:18], expected)
    assert not cache.depths[1].pages.any()


def test_pages_are_wiped_before_another_request_gets_them():
    cache = new_cache()
    slot = cache.allocate(40)
    write(cache, slot, 0, 40, seed=1).fill_(math.nan)
    cache.depths[0].pages.fill_(math.nan)
    cache.free(slot)
    assert not read(cache, cache.allocate(40), 0).any()


def test_only_pages_that_were_used_count_as_memory():
    cache = new_cache()
    page = 2 * 2 * HEADS * PAGE_TOKENS * SIZE * 4
    assert cache.nbytes == 0
    slot = cache.allocate(20)
    assert cache.nbytes == 2 * page
    cache.free(slot)
    cache.free(cache.allocate(5))
    assert cache.nbytes == 2 * page
    cache.allocate(PAGES * PAGE_TOKENS)
    assert cache.nbytes == PAGES * page == sum(depth.pages.nbytes for depth in cache.depths)
