"""What stays in memory: within both budgets, the most popular, and what is in use or pinned."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from molex.adapter import Adapter
from molex.config import AdapterConfig
from server.residents import HALF_LIFE, Popularity, Residents

CONFIG = AdapterConfig("CAUSAL_LM", r=1, lora_alpha=1, target_modules=())


@dataclass(frozen=True, eq=False)
class Key:
    nbytes: int = 1
    pinned: bool = False


def weights_of(key: Key) -> Adapter:
    return Adapter(CONFIG, {"weight": torch.zeros(key.nbytes, dtype=torch.uint8)})


class Memory:
    """Residents, with requests that hold what they got."""

    def __init__(self, max_count: int, max_bytes: int = 1000) -> None:
        self.used: list[Adapter] = []
        self.residents: Residents[Key] = Residents(max_count, max_bytes, lambda: set(self.used))

    def load(self, key: Key, *, evict: bool = True) -> list[Key] | None:
        evicted = self.residents.reserve(key, evict=evict)
        if evicted is not None:
            self.residents.add(key, weights_of(key))
        return evicted

    def ask(self, key: Key) -> list[Key] | None:
        """A request for what is not there."""
        assert self.residents.get(key) is None
        return self.load(key)


def test_what_nobody_asked_for_goes_in_the_order_that_it_came_in():
    memory = Memory(3)
    a, b, c, d, e = keys = [Key() for _ in range(5)]
    for key in keys[:3]:
        assert memory.load(key) == []
    assert memory.residents.get(a) is not None
    assert memory.load(d) == [b]
    assert memory.load(e) == [c]
    assert set(memory.residents) == {a, d, e}
    assert memory.residents.get(b) is None


def test_of_what_was_asked_for_as_often_the_least_recent_goes_first():
    memory = Memory(3)
    a, b, c = keys = [Key() for _ in range(3)]
    for key in keys:
        memory.load(key)
    for key in (c, a, b):
        memory.residents.get(key)
    assert memory.ask(Key()) == [c]
    assert memory.ask(Key()) == [a]


def with_popular() -> tuple[Memory, Key]:
    """Two places, one of them with a key that was asked for ten times."""
    memory, popular = Memory(2), Key()
    memory.load(popular)
    for _ in range(10):
        memory.residents.get(popular)
    return memory, popular


def test_what_many_ask_for_stays_beside_many_that_are_asked_for_once():
    memory, popular = with_popular()
    for _ in range(20):
        memory.ask(Key())
    assert popular in memory.residents


def test_what_was_popular_once_goes_at_last():
    memory, popular = with_popular()
    for _ in range(10 * 2 * HALF_LIFE):
        memory.ask(Key())
    assert popular not in memory.residents


def test_requests_count_for_what_is_not_there_too():
    memory = Memory(2)
    popular, first = Key(), Key()
    for _ in range(3):
        assert memory.residents.get(popular) is None
    memory.load(popular)
    memory.ask(first)
    assert memory.ask(Key()) == [first]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(1, 100))
def test_popularity_is_the_sum_of_its_source(requests, half_life):
    keys = [Key() for _ in range(5)]
    popularity: Popularity[Key] = Popularity()
    for number in requests:
        popularity.asked(keys[number], half_life)
    now = len(requests)
    for number, key in enumerate(keys):
        ages = [now - time for time, asked in enumerate(requests, start=1) if asked == number]
        expected = sum(2 ** (-age / half_life) for age in ages)
        assert 2 ** (popularity[key] - now / half_life) == pytest.approx(expected, rel=1e-9)


def test_popularity_has_no_end():
    """After years of requests it neither overflows nor loses the order of the latest ones."""
    first, second = Key(), Key()
    popularity: Popularity[Key] = Popularity()
    popularity._now = 1e10
    popularity.asked(first, 8)
    popularity.asked(second, 8)
    assert 0 < popularity[second] - popularity[first] < 1


def test_as_many_go_as_the_bytes_of_the_next_need():
    memory = Memory(10, max_bytes=10)
    small = [Key(2) for _ in range(5)]
    for key in small:
        memory.load(key)
    assert memory.load(Key(5)) == small[:3]
    assert memory.load(Key(11)) is None
    assert len(list(memory.residents)) == 3


def test_what_is_pinned_or_in_use_stays():
    memory = Memory(3)
    pinned, used, free = Key(pinned=True), Key(), Key()
    for key in (pinned, used, free):
        memory.load(key)
    memory.used.append(memory.residents.get(used))
    memory.residents.get(free)
    assert memory.load(Key()) == [free]


def test_where_room_cannot_be_made_nothing_is_evicted():
    memory = Memory(5, max_bytes=10)
    used, free = Key(6), Key(3)
    for key in (used, free):
        memory.load(key)
    memory.used.append(memory.residents.get(used))
    assert memory.load(Key(5)) is None
    assert set(memory.residents) == {used, free}
    memory.used.clear()
    assert memory.load(Key(5)) == [free, used]


def test_room_is_kept_for_what_is_being_read():
    memory = Memory(2)
    first, coming = Key(), Key()
    memory.load(first)
    assert memory.residents.reserve(coming) == []
    assert memory.residents.reserve(Key()) == [first]
    assert memory.residents.reserve(Key()) is None
    memory.residents.discard(coming)
    assert memory.residents.reserve(Key()) == []


def test_what_came_by_another_way_while_it_was_read_stays():
    memory = Memory(1)
    key = Key()
    assert memory.residents.reserve(key) == []
    assert memory.residents.reserve(key) == []
    first = weights_of(key)
    assert memory.residents.add(key, first) is first
    assert memory.residents.add(key, weights_of(key)) is first
    assert memory.load(Key()) == [key]


def test_weights_go_on_under_another_key_as_popular_as_before():
    memory = Memory(2)
    popular, other, successor = Key(), Key(), Key()
    for key in (popular, other):
        memory.load(key)
    weights = memory.residents.get(popular)
    memory.residents.get(popular)
    memory.residents.get(other)
    memory.residents.hand_over(popular, successor)
    assert popular not in memory.residents
    assert memory.load(Key()) == [other]
    assert memory.residents.get(successor) is weights


def test_nothing_is_evicted_where_that_is_forbidden():
    memory = Memory(1)
    first = Key()
    memory.load(first)
    assert memory.load(Key(), evict=False) is None
    assert list(memory.residents) == [first]


def test_deleted_weights_take_room_until_the_last_request_has_ended():
    memory = Memory(2, max_bytes=10)
    key = Key(8)
    memory.load(key)
    memory.used += [memory.residents.get(key)] * 2
    memory.residents.discard(key)
    assert memory.residents.leaving() == set(memory.used)
    memory.used.pop()
    assert memory.load(Key(3)) is None
    memory.used.pop()
    assert memory.residents.leaving() == set()
    assert memory.load(Key(3)) == []


class AnyOrder(RuleBasedStateMachine):
    """Registrations, loads that fail or end, requests and deletions in any order keep both budgets."""

    @initialize(count=st.integers(1, 4), nbytes=st.integers(4, 12))
    def start(self, count, nbytes):
        self.memory = Memory(count, nbytes)
        self.keys: list[Key] = []
        self.reading: list[Key] = []

    def pick(self, data) -> Key:
        return data.draw(st.sampled_from(self.keys))

    @rule(nbytes=st.integers(1, 5), pinned=st.booleans())
    def register(self, nbytes, pinned):
        self.keys.append(Key(nbytes, pinned))

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def ask(self, data):
        """A request finds weights, or has them read."""
        key, residents = self.pick(data), self.memory.residents
        before = list(residents)
        if (weights := residents.get(key)) is not None:
            self.memory.used.append(weights)
        elif key not in self.reading:
            evicted = residents.reserve(key)
            if evicted is not None:
                self.reading.append(key)
                assert set(evicted) == {k for k in before if k not in residents}
                kept = [k for k in before if k in residents and not k.pinned]
                idle = [k for k in kept if residents._weights[k] not in self.memory.used]
                popularity = residents._popularity
                assert all(popularity[gone] <= popularity[k] for gone in evicted for k in idle)
            else:
                assert list(residents) == before

    @precondition(lambda self: self.reading)
    @rule(good=st.booleans())
    def end_a_read(self, good):
        key = self.reading.pop(0)
        if good and key in self.keys:
            self.memory.residents.add(key, weights_of(key))
        else:
            self.memory.residents.discard(key)

    @precondition(lambda self: self.memory.used)
    @rule()
    def end_a_request(self):
        self.memory.used.pop(0)

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def delete(self, data):
        key = self.pick(data)
        self.keys.remove(key)
        self.memory.residents.discard(key)

    @invariant()
    def budgets_are_kept(self):
        if not hasattr(self, "memory"):
            return
        residents = self.memory.residents
        leaving = [adapter.nbytes for adapter in residents.leaving()]
        reserved = [key.nbytes for key in self.reading if key in self.keys]
        sizes = [key.nbytes for key in residents] + leaving + reserved
        assert len(sizes) <= residents.max_count
        assert sum(sizes) <= residents.max_bytes


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
