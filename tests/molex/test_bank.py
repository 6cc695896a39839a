"""Batches that read their factors in a bank compute what the definition says, whatever was there before."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex import lora
from molex.bank import AdapterBank
from molex.lora import ActiveLora, BatchLora, LoraWeights, LowRank, low_rank_reference
from molex.packing import Packed

IN, OUT = 6, 5
FIRST, SECOND = (0, "query"), (1, "value")
BYTES_PER_RANK = 4 * (IN + OUT)
CPU = torch.device("cpu")


def update(rank, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, IN, generator=generator, dtype=dtype)
    return LowRank(a, torch.randn(OUT, rank, generator=generator, dtype=dtype), 0.5 + seed)


def adapter(rank, seed, *, sites=(FIRST,), dtype=torch.float32):
    return LoraWeights({site: update(rank, seed + n, dtype) for n, site in enumerate(sites)})


def bank_of(ranks, sites=1, **options):
    """A bank with room for some ranks at so many sites."""
    return AdapterBank(ranks * sites * BYTES_PER_RANK, torch.float32, CPU, **options)


def served(bank, *adapters):
    """A batch of adapters that reads the bank."""
    batch = BatchLora(adapters)
    assert bank.serve(batch)
    return batch


def check(batch, site, rows_each=2):
    """That the batch adds what the definition says at a site."""
    count = len(batch.adapters)
    lengths, members = [rows_each] * count, list(range(count))
    packed = Packed(lengths, [0] * count, members, causal=False, device=CPU)
    segments = packed.segments(np.arange(count))
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count * rows_each, IN, generator=generator)
    y = torch.randn(count * rows_each, OUT, generator=generator)
    with torch.no_grad():
        result = ActiveLora(batch, segments).add(y.clone(), x, site)
    theirs = batch.updates.get(site, {})
    own = [(theirs[m], start, stop) for m, start, stop in segments if m in theirs]
    torch.testing.assert_close(result, low_rank_reference(y, x, own), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("call_cost", [10**12, 300, 0])
@given(data=st.data())
def test_whatever_was_there_before_a_batch_computes_its_own(data, call_cost):
    """Batches of adapters of any ranks and sites, in a bank that is mostly too small for all of them."""
    sites = st.sampled_from([(FIRST,), (SECOND,), (FIRST, SECOND), ()])
    ranks = data.draw(st.lists(st.tuples(st.integers(1, 9), sites), min_size=1, max_size=6))
    adapters = [adapter(rank, seed, sites=where) for seed, (rank, where) in enumerate(ranks)]
    bank = bank_of(data.draw(st.integers(0, 40)))
    some = st.lists(st.sampled_from(adapters), min_size=1, max_size=4, unique=True)
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "OPERATIONS_PER_CALL", call_cost)
        for chosen in data.draw(st.lists(some, min_size=1, max_size=8)):
            batch = BatchLora(chosen)
            bank.serve(batch)
            # Some batches go on while others come, as a long prompt does.
            held = [*held, batch][data.draw(st.integers(0, len(held) + 1)) :]
            assert bank.nbytes <= bank.max_bytes
            for reading in [batch, *held]:
                for site in reading.updates:
                    check(reading, site)


def test_adapters_of_a_class_take_each_others_places():
    bank = bank_of(16)
    first, second, third = (adapter(rank, seed=rank) for rank in (5, 8, 7))
    for weights in (first, second, third):
        served(bank, weights)
    assert first not in bank
    assert second in bank
    assert third in bank


def test_two_slots_leave_one_of_twice_the_width():
    bank = bank_of(8)
    small = [adapter(4, seed=n) for n in range(2)]
    served(bank, *small)
    large = adapter(8, seed=2)
    check(served(bank, large), FIRST)
    assert [weights in bank for weights in (*small, large)] == [False, False, True]


def test_the_least_recently_used_goes_first():
    bank = bank_of(12)
    first, second, third = (adapter(4, seed=n) for n in range(3))
    served(bank, first, second, third)
    served(bank, first)
    served(bank, adapter(4, seed=3))
    assert [weights in bank for weights in (first, second, third)] == [True, False, True]


def test_free_room_is_taken_before_anyone_goes():
    bank = bank_of(12)
    adapters = [adapter(4, seed=n) for n in range(3)]
    for weights in adapters:
        served(bank, weights)
    assert all(weights in bank for weights in adapters)


def test_slots_that_a_batch_reads_are_not_taken():
    bank = bank_of(8)
    first, second = adapter(4, seed=0), adapter(8, seed=1)
    reading = served(bank, first)
    waiting = BatchLora([second])
    assert not bank.serve(waiting)
    check(waiting, FIRST)
    check(reading, FIRST)
    del reading
    assert bank.serve(waiting)
    assert first not in bank


def test_pinned_adapters_keep_their_slots():
    pinned = set()
    bank = bank_of(8, pinned=lambda: pinned)
    first, second, third = (adapter(4, seed=n) for n in range(3))
    served(bank, first, second)
    pinned.add(first)
    served(bank, third)
    assert first in bank
    assert second not in bank
    pinned.add(third)
    assert not bank.serve(BatchLora([second]))
    pinned.clear()
    assert bank.serve(BatchLora([second]))


def test_a_slot_is_free_when_its_adapter_has_died():
    kept, gone = adapter(4, seed=0), adapter(4, seed=1)
    bank = bank_of(8, pinned=lambda: {kept})
    served(bank, kept, gone)
    assert len(bank) == 2
    del gone
    gc.collect()
    assert len(bank) == 1
    check(served(bank, adapter(4, seed=2)), FIRST)


def test_an_adapter_that_is_too_wide_is_stacked():
    bank = bank_of(7)
    batch = BatchLora([adapter(5, seed=0)])
    assert not bank.serve(batch)
    check(batch, FIRST)


def test_a_batch_that_does_not_fit_holds_no_slot():
    bank = bank_of(8)
    batch = BatchLora([adapter(4, seed=0), adapter(8, seed=1)])
    assert not bank.serve(batch)
    assert bank.serve(BatchLora([adapter(8, seed=2)]))
    for site in batch.updates:
        check(batch, site)


def test_a_new_site_shares_the_budget():
    bank = bank_of(16)
    first = adapter(4, seed=0)
    reading = served(bank, first)
    both = BatchLora([adapter(4, seed=1, sites=(FIRST, SECOND))])
    assert not bank.serve(both)
    del reading
    assert bank.serve(both)
    assert first not in bank
    assert bank.nbytes == 8 * 2 * BYTES_PER_RANK
    check(both, SECOND)
    check(served(bank, first), FIRST)


def test_the_bare_base_needs_no_slot():
    bank = bank_of(4)
    bare = LoraWeights()
    check(served(bank, bare, adapter(4, seed=0)), FIRST)
    assert bare not in bank


def test_factors_that_are_trained_are_not_copied():
    bank = bank_of(8)
    trained = adapter(4, seed=0)
    trained.updates[FIRST].b.requires_grad_()
    batch = BatchLora([trained])
    assert not bank.serve(batch)
    with torch.no_grad():
        check(batch, FIRST)
        trained.updates[FIRST].b.mul_(2)
        check(batch, FIRST)


def test_factors_of_another_precision_are_not_copied():
    bank = bank_of(8)
    assert not bank.serve(BatchLora([adapter(4, seed=0, dtype=torch.float64)]))


def test_what_is_not_a_number_stays_in_its_adapters_rows(monkeypatch):
    monkeypatch.setattr(lora, "OPERATIONS_PER_CALL", 10**12)
    bank = bank_of(8)
    poisoned, healthy = adapter(4, seed=0), adapter(3, seed=1)
    poisoned.updates[FIRST].a.fill_(torch.nan)
    batch = served(bank, poisoned, healthy)
    packed = Packed([2, 2], [0, 0], [0, 1], causal=False, device=CPU)
    segments = packed.segments(np.arange(2))
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(4, OUT)
    with torch.no_grad():
        result = ActiveLora(batch, segments).add(y.clone(), x, FIRST)
    assert result[:2].isnan().all()
    expected = low_rank_reference(y, x, [(healthy.updates[FIRST], 2, 4)])
    torch.testing.assert_close(result[2:], expected[2:], atol=1e-4, rtol=1e-4)
