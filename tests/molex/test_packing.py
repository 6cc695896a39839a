"""Packed rows: where tokens lie, and how attention groups them."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex.packing import Packed, ranges

CPU = torch.device("cpu")


@st.composite
def layouts(draw):
    """Lengths, past and members of 1 to 10 requests; many of one token, as in decoding."""
    count = draw(st.integers(1, 10))
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 6)), min_size=count, max_size=count))
    past = draw(st.lists(st.integers(0, 400), min_size=count, max_size=count))
    members = sorted(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    return lengths, past, members


def pack(lengths, past, members, causal=True):
    return Packed(lengths, past, members, causal=causal, device=CPU)


def requests_of(data, packed):
    return np.array(data.draw(st.lists(st.integers(0, len(packed) - 1), min_size=1, unique=True)))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 6), st.integers(0, 4)), max_size=6))
def test_ranges_lie_side_by_side_and_repeat_their_last_number(given):
    starts, lengths, padding = np.array(given, dtype=np.int64).reshape(-1, 3).T
    plain = [[start + j for j in range(length)] for start, length, _ in given]
    assert ranges(starts, lengths).tolist() == list(chain(*plain))
    padded = [numbers + numbers[-1:] * more for numbers, (_, _, more) in zip(plain, given, strict=True)]
    assert ranges(starts, lengths, lengths + padding).tolist() == list(chain(*padded))


@given(layouts())
def test_tokens_know_their_request_and_position(layout):
    packed = pack(*layout)
    lengths, past, _ = layout
    assert packed.num_tokens == sum(lengths)
    assert packed.owners.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    expected = [p + j for n, p in zip(lengths, past, strict=True) for j in range(n)]
    assert packed.positions.tolist() == expected


@given(layouts(), st.data())
def test_tokens_of_requests_come_in_the_order_asked_for(layout, data):
    packed = pack(*layout)
    requests = requests_of(data, packed)
    expected = [packed.offsets[i] + j for i in requests for j in range(packed.lengths[i])]
    assert packed.tokens(requests).tolist() == expected


@given(layouts(), st.data())
def test_a_subset_is_packed_like_its_requests(layout, data):
    packed = pack(*layout, causal=False)
    requests = requests_of(data, packed)
    subset = packed.subset(requests)
    assert subset.lengths.tolist() == [packed.lengths[i] for i in requests]
    assert subset.past.tolist() == [packed.past[i] for i in requests]
    assert subset.members.tolist() == [packed.members[i] for i in requests]
    assert subset.positions.tolist() == packed.positions[packed.tokens(requests)].tolist()
    assert not subset.causal


@given(layouts(), st.data())
def test_segments_are_the_longest_runs_of_one_adapter(layout, data):
    packed = pack(*layout)
    requests = requests_of(data, packed)
    runs = packed.segments(requests)
    members = [packed.members[i] for i in requests for _ in range(packed.lengths[i])]
    assert [token for _, start, stop in runs for token in range(start, stop)] == list(range(len(members)))
    assert all(set(members[start:stop]) == {member} for member, start, stop in runs)
    assert all(one[0] != other[0] for one, other in pairwise(runs))


@given(layouts())
def test_groups_cover_each_request_once(layout):
    packed = pack(*layout)
    assert sorted(i for group in packed.groups for i in group.requests) == list(range(len(packed)))
    for group in packed.groups:
        assert list(group.lengths) == [packed.lengths[i] for i in group.requests]
        assert max(group.lengths) <= group.queries
        assert list(group.keys) == [packed.past[i] + packed.lengths[i] for i in group.requests]
        assert group.has_past == any(packed.past[i] for i in group.requests)


@given(layouts())
def test_a_group_holds_the_tokens_of_its_requests_in_order_and_restoring_undoes_that(layout):
    packed = pack(*layout)
    tokens = torch.arange(packed.num_tokens)
    grouped = tokens if packed.grouped is None else tokens[packed.grouped]
    restored = grouped[packed.restored]
    assert torch.equal(restored, tokens)
    for chosen in (None, np.arange(packed.num_tokens), np.arange(packed.num_tokens)[::-2].copy()):
        rows = packed.grouped_rows_of(chosen)
        wanted = tokens if chosen is None else tokens[torch.from_numpy(chosen)]
        assert torch.equal(grouped if rows is None else grouped[rows], wanted)
        assert packed.grouped_rows_of(chosen) is rows
    rows = grouped.split([group.num_rows for group in packed.groups])
    for group, part in zip(packed.groups, rows, strict=True):
        requests = part.view(-1, group.queries)
        for i, length, row in zip(group.requests, group.lengths, requests, strict=True):
            own = torch.from_numpy(packed.tokens(np.array([i])))
            assert torch.equal(row[:length], own)
            assert (row[length:] == own[-1]).all()


def test_requests_of_like_length_share_a_call_and_others_do_not():
    packed = pack([20, 40, 31, 7, 17], [0] * 5, [0] * 5)
    calls = sorted((group.requests.tolist(), group.queries) for group in packed.groups)
    assert calls == [([0, 2, 4], 32), ([1], 40), ([3], 7)]


def test_a_call_takes_a_bounded_number_of_rows():
    packed = pack([200] * 5, [0] * 5, [0] * 5)
    assert [group.requests.tolist() for group in packed.groups] == [[0, 1], [2, 3], [4]]
    assert not any(group.is_padded for group in packed.groups)


def test_single_tokens_of_like_history_share_a_call():
    packed = pack([1, 5, 1, 1], [10, 3, 400, 12], [0, 0, 0, 0])
    assert sorted(sorted(group.requests) for group in packed.groups) == [[0, 3], [1], [2]]


def test_groups_in_packed_order_need_no_restoring():
    assert pack([16, 16], [0, 0], [0, 0]).grouped is None
    assert pack([7], [0], [0]).grouped is None
