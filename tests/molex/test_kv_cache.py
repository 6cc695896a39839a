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


ROUTE = ("a route",)


@given(
    st.lists(
        st.one_of(st.tuples(st.integers(1, 5), st.text("ab", max_size=5), st.booleans()), st.integers(0, 9)),
        max_size=60,
    )
)
def test_kept_pages_are_shared_by_key_given_away_last_and_never_lost(actions):
    """A triple asks for pages under a chain of keys and may keep them, a number gives a slot back."""
    cache, slots, page_of = new_cache(), [], {}
    for action in actions:
        if isinstance(action, int):
            if action < len(slots):
                cache.free(slots.pop(action))
            continue
        count, letters, keeps = action
        keys = [letters[: n + 1].encode() for n in range(min(count, len(letters)))]
        try:
            slot = cache.allocate(count * PAGE_TOKENS, 1, keys)
        except CacheFullError:
            continue
        slots.append(slot)
        pages = slot.pages[0].tolist()
        reused = slot.num_reused // PAGE_TOKENS
        assert pages[:reused] == [page_of[key] for key in keys[:reused]]
        assert slot.route == (ROUTE if reused else None)
        # Its other pages are nobody else's.
        others = {page for other in slots[:-1] for page in other.pages[0].tolist()}
        assert not others & set(pages[reused:])
        if keeps:
            cache.keep(slot, keys, ROUTE)
            page_of |= {key: page for key, page, own in zip(keys, pages, slot.keys, strict=False) if own}
        taken = {page for other in slots for page in other.pages[0].tolist()}
        assert cache.num_free == PAGES - len(taken)
    for slot in slots:
        cache.free(slot)
    assert cache.num_free == PAGES
    everything = cache.allocate(PAGES * PAGE_TOKENS)
    assert sorted(everything.pages[0].tolist()) == list(range(PAGES))
    assert cache.num_unused == 0


def test_kept_pages_stay_until_others_run_out_the_latest_used_longest():
    cache, keys = new_cache(), {name: [f"{name}{n}".encode() for n in range(2)] for name in "abc"}
    for name in "abca":
        slot = cache.allocate(32, 2, keys[name])
        cache.keep(slot, keys[name], ROUTE)
        cache.free(slot)
    assert (cache.num_free, cache.num_unused) == (PAGES, 12)
    cache.free(cache.allocate(3 * PAGE_TOKENS))  # The end of b and then its beginning go.
    assert cache.num_unused == 8
    assert [cache.allocate(32, 2, keys[name]).num_reused for name in "bac"] == [0, 32, 32]


def test_a_page_beside_a_kept_one_of_the_same_key_is_given_back():
    cache, keys = new_cache(), [b"a", b"b"]
    first, second = cache.allocate(40), cache.allocate(40)
    cache.keep(first, keys, ROUTE)
    cache.keep(second, keys, ROUTE)
    cache.free(second)
    assert (cache.num_free, cache.num_unused) == (PAGES - 3, 0)
    cache.free(first)
    assert (cache.num_free, cache.num_unused) == (PAGES, 2)


def test_what_does_not_fit_and_what_was_given_back_are_named():
    cache = new_cache()
    slot = cache.allocate(10 * PAGE_TOKENS)
    with pytest.raises(CacheFullError, match="33 tokens need 3 more pages; 2 are free"):
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
