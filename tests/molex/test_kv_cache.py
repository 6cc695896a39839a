"""Slots and streams of keys and values."""

from __future__ import annotations

import pytest
import torch

from molex.errors import MolexError
from molex.kv_cache import STREAMS, CacheFullError, KVCache

HEADS, SIZE, SLOTS, LENGTH = 2, 4, 3, 6


@pytest.fixture
def cache():
    device = torch.device("cpu")
    return KVCache(
        SLOTS, LENGTH, num_layers=2, num_heads=HEADS, head_dim=SIZE, dtype=torch.float32, device=device
    )


def write_request(cache, slot, choice, length, seed):
    keys, values = torch.randn(2, length, HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
    streams = torch.full((length,), cache.stream(slot, choice))
    cache.depths[0].write(streams, torch.arange(length), keys, values)
    return keys, values


def test_the_lowest_free_slot_is_taken(cache):
    assert [cache.allocate() for _ in range(SLOTS)] == [0, 1, 2]
    cache.free(2)
    cache.free(0)
    assert cache.num_free == 2
    assert [cache.allocate(), cache.allocate()] == [0, 2]


def test_a_full_cache_and_a_foreign_slot_are_errors(cache):
    for _ in range(SLOTS):
        cache.allocate()
    with pytest.raises(CacheFullError, match="all 3 generation slots are taken"):
        cache.allocate()
    cache.free(1)
    for slot in (1, -1, SLOTS):
        with pytest.raises(MolexError, match=f"slot {slot} is not allocated"):
            cache.free(slot)


def test_streams_of_slots_and_choices_never_meet(cache):
    streams = [cache.stream(slot, choice) for slot in range(SLOTS) for choice in range(STREAMS)]
    assert sorted(streams) == list(range(SLOTS * STREAMS))
    assert all(len(depth.keys) == len(depth.values) == len(streams) for depth in cache.depths)


@pytest.mark.parametrize("slots", [[0, 1], [2, 0], [1]], ids=str)
def test_what_is_written_is_read_back(cache, slots):
    written = {slot: write_request(cache, slot, 1, 3 + slot, seed=slot) for slot in range(SLOTS)}
    keys, values = cache.depths[0].read([cache.stream(slot, 1) for slot in slots], LENGTH)
    assert keys.shape == values.shape == (len(slots), HEADS, LENGTH, SIZE)
    for n, slot in enumerate(slots):
        length = 3 + slot
        torch.testing.assert_close(keys[n, :, :length], written[slot][0].transpose(0, 1))
        torch.testing.assert_close(values[n, :, :length], written[slot][1].transpose(0, 1))
        assert not keys[n, :, length:].any()


def test_depths_and_choices_are_kept_apart(cache):
    write_request(cache, 0, 1, 4, seed=1)
    assert not cache.depths[1].keys.any()
    assert not cache.depths[0].keys[cache.stream(0, 0)].any()
    assert not cache.depths[0].keys[cache.stream(0, 2)].any()
