from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from server.fair_queue import OLDEST_EVERY, RECENT_SECONDS, FairQueue


@dataclass(eq=False)
class Item:
    tenant: str | None
    num_new_tokens: int = 1
    priority: int = 0
    num_pages: int = 0


def queue(*items: Item) -> FairQueue[Item]:
    made: FairQueue[Item] = FairQueue(share=10**9, places=16)
    made.extend(items)
    return made


def drain(target: FairQueue[Item]) -> list[Item]:
    return [target.pop() for _ in range(len(target))]


def tenants(items: list[Item]) -> str:
    return "".join(str(item.tenant) for item in items)


def test_tenants_take_turns():
    assert tenants(drain(queue(*[Item("a")] * 3, *[Item("b")] * 3))) == "ababab"


def test_turns_are_measured_in_tokens():
    assert tenants(drain(queue(*[Item("a", 30)] * 2, *[Item("b", 10)] * 6))) == "abbbabbb"


def test_one_who_comes_late_starts_level_and_has_saved_nothing_up():
    target = queue(*[Item("a")] * 100)
    for _ in range(50):
        target.pop()
    target.extend([Item("b")] * 50)
    assert abs(tenants([target.pop() for _ in range(20)]).count("b") - 10) <= 1


def test_one_who_comes_back_has_lost_nothing():
    target = queue(Item("a", 1000))
    target.pop()
    target.extend([Item("b")] * 3)
    target.extend([Item("a")] * 3)
    assert tenants(drain(target)).count("a") == 3


def test_what_is_put_back_is_next_and_not_held_against_its_tenant():
    target = queue(*[Item("a", 5)] * 3, *[Item("b", 5)] * 3)
    expected = tenants(drain(queue(*[Item("a", 5)] * 3, *[Item("b", 5)] * 3)))
    for _ in range(4):
        target.set_aside()
    target.put_back()
    assert tenants(drain(target)) == expected


def test_what_is_not_kept_is_not_held_against_its_tenant():
    target = queue(*[Item("a", 100)] * 5, Item("a", 1), Item("b", 1))
    target.keep(lambda item: item.num_new_tokens == 1)
    assert tenants(drain(target)) == "ab"


def test_one_who_comes_after_all_have_left_starts_level_with_them():
    target = queue(*[Item("a")] * 100)
    for _ in range(50):
        target.pop()
    target.keep(lambda item: False)
    target.extend([Item("b")] * 50)
    target.extend([Item("a")] * 50)
    assert abs(tenants([target.pop() for _ in range(20)]).count("b") - 10) <= 1


def test_one_who_asks_for_little_counts_for_some_seconds():
    now = [0.0]
    target: FairQueue[Item] = FairQueue(share=8, places=16, clock=lambda: now[0])
    target.extend([Item("light"), *[Item("flood")] * 50])
    target.begin_step([], None)
    assert target.share("flood") == 2
    assert target.share("light") == 8
    while target.count("light"):
        target.pop()
    now[0] += RECENT_SECONDS
    target.begin_step([Item("flood")], None)
    assert target.share("flood") == 2
    now[0] += 0.1
    target.begin_step([Item("flood")], None)
    assert target.share("flood") == 8
    target.begin_step([Item("flood"), Item("light")], None)
    assert target.share("flood") == 2


def test_generations_that_wait_or_run_make_a_flood():
    target: FairQueue[Item] = FairQueue(share=100, places=16)
    generations = [Item("many", num_pages=1) for _ in range(6)]
    target.extend([Item("light"), *generations[:3]])
    target.begin_step(generations[3:5], None)
    assert not target.floods("many")
    target.begin_step(generations[3:], None)
    assert target.floods("many")
    target.keep(lambda item: item is not generations[0])
    target.begin_step(generations[3:], None)
    assert not target.floods("many")
    while target.count("many") > 1:
        target.pop()
    target.begin_step([*generations[2:], *[Item("many")] * 9], None)
    assert not target.floods("many")


def test_without_tenants_there_are_no_shares():
    target = queue(*[Item(None, 5)] * 3, Item("light"))
    target.begin_step([], None)
    assert target.share(None) == target.longest(None) == sys.maxsize


def test_lower_priorities_are_earlier_and_equal_ones_keep_their_order():
    given = [Item("a", priority=priority) for priority in (1, 0, 1, -7, 0)]
    assert drain(queue(*given)) == [given[place] for place in (3, 1, 4, 0, 2)]


def test_nothing_waits_for_ever_for_what_is_more_urgent():
    late = Item("a", priority=9)
    target = queue(*[Item("a")] * 3)
    target.pop()
    target.extend([late])
    served = []
    for _ in range(3 * OLDEST_EVERY):
        target.extend([Item("a", priority=-9)])
        target.set_aside()
        target.put_back()
        served.append(target.pop())
    assert late in served


items = st.lists(st.builds(Item, st.sampled_from("abc"), st.integers(1, 20)), max_size=40)


@given(items)
def test_everything_is_served_and_each_tenants_in_its_order(added):
    served = drain(queue(*added))
    for tenant in "abc":
        mine = [item for item in served if item.tenant == tenant]
        assert mine == [item for item in added if item.tenant == tenant]


@given(items, items)
def test_while_two_wait_neither_gets_ahead_by_more_than_one_prompt(first, second):
    target = queue(*first)
    for _ in range(len(first) // 2):
        target.pop()
    target.extend(second)
    given_tokens: Counter[str | None] = Counter()
    while target.count("a") and target.count("b"):
        item = target.pop()
        given_tokens[item.tenant] += item.num_new_tokens
        assert abs(given_tokens["a"] - given_tokens["b"]) <= 2 * 20
