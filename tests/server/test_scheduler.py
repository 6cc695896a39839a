from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ServiceError
from server.scheduler import PART_TOKENS, Scheduler
from tests.server.work import Work, run_batch


def scheduler(bases="a", *, budget=10, share=1000, slots=2, queue=100, pages=20) -> Scheduler[Work]:
    return Scheduler(
        dict.fromkeys(bases, pages),
        max_batch_tokens=budget,
        max_tenant_tokens=share,
        max_sequences=slots,
        max_queue=queue,
    )


def step(target: Scheduler[Work]) -> list[Work]:
    """Run one step; returns the batch."""
    batch = target.schedule()
    if batch is None:
        return []
    run_batch(batch)
    target.postprocess(batch)
    return list(batch.sequences)


def test_the_module_needs_neither_torch_nor_a_web_framework():
    code = "import sys, server.scheduler; print({'torch', 'fastapi', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_prompts_fill_the_token_budget_oldest_first():
    target, works = scheduler(), [Work(4), Work(5), Work(3), Work(1)]
    target.add(works)
    assert step(target) == works[:2]
    assert step(target) == works[2:]
    assert target.schedule() is None


def test_a_prompt_longer_than_the_budget_runs_in_parts_and_the_rest_of_the_last_step_is_used():
    target, long, short = scheduler(), Work(24), Work(3)
    target.add([long, short, Work(7)])
    assert [step(target) for _ in range(2)] == [[long], [long]]
    assert long.run == 20
    assert step(target) == [short, long]
    assert long.finished


def test_decoding_goes_on_beside_a_prompt_in_parts():
    target, decoding, long = scheduler(), Work(2, outputs=5), Work(20, outputs=1)
    target.add([decoding])
    step(target)
    target.add([long])
    parts = []
    while not long.done:
        assert step(target) == [decoding, long]
        parts.append(long.run)
    assert parts == [9, 18, 20]


def test_who_comes_while_something_short_runs_in_parts_waits_for_one_of_them():
    target, background, other = scheduler(), Work(2 * PART_TOKENS + 1, in_parts=True), Work(4)
    target.add([background])
    assert step(target) == [background]
    target.add([other])
    assert step(target) == [other]
    assert (other.finished, background.run) == (True, PART_TOKENS)
    assert step(target) == [background]
    assert step(target) == [background]
    assert background.finished
    assert target.schedule() is None


def test_what_gives_way_to_others_takes_part_in_every_other_step():
    target, decoding, background = scheduler(), Work(1, outputs=9), Work(3 * PART_TOKENS, in_parts=True)
    target.add([decoding, background])
    batches = [step(target) for _ in range(6)]
    assert batches == [[decoding], [decoding, background]] * 3
    assert background.finished
    assert step(target) == [decoding]


def test_one_short_prompt_runs_in_parts_at_a_time():
    target, first, second = scheduler(), Work(PART_TOKENS + 1, in_parts=True), Work(1, in_parts=True)
    target.add([first, second])
    assert [step(target) for _ in range(3)] == [[first], [first], [second]]
    assert target.schedule() is None


def test_what_is_to_run_in_parts_runs_whole_beside_a_long_prompt():
    target, long, background = scheduler(), Work(14), Work(3, in_parts=True)
    target.add([long])
    step(target)
    target.add([background])
    assert step(target) == [background, long]
    assert background.finished


def test_a_prompt_in_parts_is_dropped_when_cancelled():
    target, long = scheduler(), Work(24, outputs=1)
    target.add([long, Work(1)])
    step(target)
    assert (target.num_running("a"), target.num_waiting("a")) == (1, 1)
    long.cancelled = True
    assert target.drop_cancelled() == [long]
    assert step(target)[0].length == 1
    assert target.schedule() is None


def test_decoding_goes_on_beside_new_prompts():
    target, first, second = scheduler(), Work(5, outputs=3), Work(9)
    target.add([first])
    step(target)
    target.add([second, Work(1)])
    assert step(target) == [first, second]


def test_generations_wait_for_a_slot_and_classifications_pass_them():
    target = scheduler(slots=1)
    running, waiting, passing = Work(1, outputs=2), Work(1, outputs=1), Work(1)
    target.add([running, waiting, passing])
    assert step(target) == [running, passing]
    assert step(target) == [running]
    assert step(target) == [waiting]


def test_generations_wait_for_pages_in_their_order_and_classifications_pass_them():
    target = scheduler(slots=9, pages=10)
    running, large, small = Work(1, outputs=2, pages=6), Work(1, outputs=2, pages=5), Work(1, outputs=1)
    passing = Work(1)
    target.add([running, large, small, passing])
    assert step(target) == [running, passing]
    assert step(target) == [running]
    assert step(target) == [large, small]


def test_what_needs_more_pages_than_there_are_is_refused():
    target = scheduler(pages=4)
    target.add([Work(1, outputs=1, pages=4)])
    with pytest.raises(ServiceError, match="need 5 pages of the key-value cache; it has 4") as caught:
        target.add([Work(1, outputs=1, pages=5)])
    assert (caught.value.kind.status, caught.value.param) == (400, "max_tokens")
    assert target.num_waiting("a") == 1


def test_bases_take_turns():
    target = scheduler("ab", budget=1)
    works = [Work(1), Work(1), Work(1, base="b"), Work(1, base="b")]
    target.add(works[:2])
    target.add(works[2:])
    assert [step(target)[0].base for _ in works] == ["a", "b", "a", "b"]


def test_a_full_queue_refuses_all_of_a_request():
    target = scheduler(queue=3)
    target.add([Work(1), Work(1)])
    with pytest.raises(ServiceError) as caught:
        target.add([Work(1), Work(1)])
    assert caught.value.kind.status == 429
    assert caught.value.headers == {"retry-after": "1"}
    assert target.num_waiting("a") == 2


def test_a_full_queue_takes_what_may_go_beyond_its_limit():
    target = scheduler(queue=1)
    target.add([Work(1)])
    target.add([Work(1)], beyond_limit=True)
    assert target.num_waiting("a") == 2


def test_cancelled_work_is_dropped_waiting_or_running():
    target = scheduler()
    works = [Work(1, outputs=9), Work(1, outputs=9), Work(1, outputs=9)]
    target.add(works)
    step(target)
    works[0].cancelled = works[2].cancelled = True
    assert target.drop_cancelled() == [works[0]]
    assert (target.num_running("a"), target.num_waiting("a")) == (1, 0)
    assert step(target) == [works[1]]


class LeavingWork(Work):
    """Cancelled by another thread right after the first look at it."""

    looks = 0

    @property
    def cancelled(self) -> bool:
        self.looks += 1
        return self.looks > 1

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        assert not value


def test_what_is_cancelled_while_the_scheduler_looks_is_kept_or_returned():
    target, leaving = scheduler(), LeavingWork(1, outputs=9)
    target.add([leaving])
    step(target)
    leaving.looks = 0
    assert target.drop_cancelled() == []
    assert target.num_running("a") == 1
    assert target.drop_cancelled() == [leaving]
    assert target.num_running("a") == 0


def test_drop_all_returns_everything():
    target, works = scheduler("ab"), [Work(1, outputs=9), Work(20), Work(30)]
    target.add(works)
    step(target)
    step(target)
    assert works[1].is_paused
    other = Work(1, base="b")
    target.add([other])
    assert set(target.drop_all()) == {*works, other}
    assert target.schedule() is None


def test_a_flood_of_one_tenant_does_not_hold_up_another():
    target = scheduler(budget=10, queue=500)
    target.add([Work(5, tenant="flood") for _ in range(400)])
    for _ in range(10):
        step(target)
    late = Work(5, tenant="late")
    target.add([late])
    assert late in step(target)


def test_a_tenant_takes_its_share_of_a_step_and_no_more():
    target = scheduler(budget=100, share=10)
    target.add([Work(4, tenant="x") for _ in range(5)])
    target.add([Work(50, tenant="y")])
    target.add([Work(4) for _ in range(5)])
    assert [work.tenant for work in step(target)].count("x") == 2
    # By now the others wait for nothing, and their next request is to find a short step under way.
    assert [[(work.tenant, work.length) for work in step(target)] for _ in range(3)] == [[("x", 4)]] * 3
    assert target.schedule() is None


def test_a_tenant_that_is_alone_has_its_whole_share():
    target = scheduler(budget=100, share=10)
    target.add([Work(3, tenant="x") for _ in range(7)])
    assert [len(step(target)) for _ in range(3)] == [3, 3, 1]


def test_beside_one_who_asks_for_little_a_flood_takes_a_quarter_of_its_share():
    target = scheduler(budget=100, share=16)
    target.add([Work(2, tenant="flood") for _ in range(40)])
    assert len(step(target)) == 8
    target.add([Work(2, tenant="light")])
    assert [work.tenant for work in step(target)] == ["light"]
    assert [work.tenant for work in step(target)] == ["flood", "flood"]


def test_a_flood_is_not_kept_out_by_those_who_always_ask_for_little():
    target = scheduler(budget=100, share=16)
    target.add([Work(2, tenant="flood") for _ in range(40)])
    for _ in range(10):
        target.add([Work(2, tenant="light")])
        step(target)
    assert target.num_waiting("a") == 40 - 5 * 2


def test_two_who_flood_do_not_make_each_others_steps_short():
    target = scheduler(budget=100, share=16)
    for tenant in "xy":
        target.add([Work(2, tenant=tenant) for _ in range(40)])
    assert Counter(work.tenant for work in step(target)) == {"x": 8, "y": 8}


def test_a_long_prompt_of_a_flood_runs_in_small_parts_beside_one_who_asks_for_little():
    target, long = scheduler(budget=100, share=16), Work(80, tenant="flood")
    target.add([Work(1, tenant="light")])
    step(target)
    target.add([long])
    target.add([Work(2, tenant="light")])
    assert [work.tenant for work in step(target)] == ["light", "flood"]
    assert long.run == 4
    step(target)
    assert long.run == 8


def test_a_second_long_prompt_does_not_hold_up_those_behind_it():
    target, longs = scheduler(budget=100, share=16), [Work(80, tenant="x"), Work(90, tenant="y")]
    target.add([Work(1, tenant="light")])
    step(target)
    for long in longs:
        target.add([long])
    target.add([Work(2, tenant="light")])
    assert [work.tenant for work in step(target)] == ["light", "x"]
    for _ in range(60):
        step(target)
    assert all(long.finished for long in longs)


def test_generations_of_a_flood_leave_places_to_one_who_asks_for_little():
    target = scheduler(budget=100, share=10, slots=4)
    target.add([Work(1, outputs=1, tenant="light")])
    step(target)
    target.add([Work(1, outputs=9, tenant="flood") for _ in range(20)])
    assert [work.tenant for work in step(target)] == ["flood"] * 2
    target.add([Work(1, outputs=9, tenant="light")])
    assert Counter(work.tenant for work in step(target)) == {"flood": 2, "light": 1}


def test_generations_of_a_flood_take_as_many_tokens_as_those_beside_them():
    target, light = scheduler(budget=100, share=16, slots=8), Work(1, outputs=200, tenant="light")
    target.add([light])
    step(target)
    target.add([Work(3, outputs=50, tenant="flood") for _ in range(40)])
    taken = Counter(work.tenant for _ in range(150) for work in step(target))
    assert taken["light"] == 150
    assert 100 < taken["flood"] < 150 + 16
    while not light.finished:
        step(target)
    # Half of the places, in every step from now on.
    assert min(len(step(target)) for _ in range(10)) == 4


def test_generations_of_tenants_who_ask_for_little_do_not_rest():
    target = scheduler(budget=100, share=16, slots=8)
    for tenant in "xy":
        target.add([Work(1, outputs=20, tenant=tenant) for _ in range(2)])
    step(target)
    assert [len(step(target)) for _ in range(10)] == [4] * 10


def test_a_generation_that_needs_more_than_half_of_the_cache_is_not_kept_from_it():
    target, large = (
        scheduler(budget=100, share=10, slots=4, pages=10),
        Work(1, outputs=1, pages=9, tenant="x"),
    )
    target.add([Work(1, tenant="light")])
    step(target)
    target.add([large])
    assert step(target) == [large]


def test_what_waits_for_its_own_tenant_to_end_holds_up_nobody_else():
    target = scheduler(budget=100, share=10, slots=4, pages=10)
    target.add([Work(1, outputs=9, pages=4, tenant="flood")])
    step(target)
    # Half of the pages are what the flood may have, and more than are left.
    target.add([Work(1, outputs=9, pages=7, tenant="flood"), Work(1, outputs=9, pages=2, tenant="light")])
    assert [work.tenant for work in step(target)] == ["flood", "light"]


def test_priorities_order_what_waits_within_a_tenant_alone():
    target = scheduler(budget=2, share=2)
    late, urgent = Work(1, tenant="x", priority=5), Work(1, tenant="x", priority=-5)
    others = [Work(1, tenant="y", priority=100) for _ in range(2)]
    target.add([late, urgent])
    target.add(others)
    assert {*step(target)} == {urgent, others[0]}
    assert {*step(target)} == {late, others[1]}


def test_a_flood_of_one_tenant_refuses_nobody_else():
    target = scheduler(queue=3)
    target.add([Work(1, tenant="flood") for _ in range(3)])
    with pytest.raises(ServiceError):
        target.add([Work(1, tenant="flood")])
    target.add([Work(1, tenant="late") for _ in range(3)])
    assert target.num_waiting("a") == 6


def test_generations_wait_for_a_slot_in_turns_of_their_tenants():
    target = scheduler(slots=1)
    flood = [Work(1, outputs=1, tenant="flood") for _ in range(5)]
    target.add(flood)
    step(target)
    late = Work(1, outputs=1, tenant="late")
    target.add([late])
    assert [step(target) for _ in range(3)] == [[late], [flood[1]], [flood[2]]]


def test_a_prompt_longer_than_the_share_and_the_budget_runs_in_parts_beside_a_flood():
    target, long = scheduler(budget=10, share=4), Work(24, tenant="long")
    target.add([Work(2, tenant="flood") for _ in range(50)])
    target.add([long])
    for _ in range(20):
        step(target)
    assert long.finished


def test_what_is_left_of_a_prompt_in_parts_counts_against_its_tenants_share():
    target = scheduler(budget=10, share=4)
    target.add([Work(13, tenant="x"), Work(2, tenant="x"), Work(2, tenant="y")])
    assert [work.length for work in step(target)] == [2]
    for _ in range(13):
        assert [work.length for work in step(target)] == [13]
    assert [work.length for work in step(target)] == [2]


def test_a_generation_that_waits_for_pages_takes_nothing_of_its_tenants_share():
    target = scheduler(budget=100, share=10, pages=5, slots=9)
    running, large = Work(1, outputs=3, pages=5, tenant="y"), Work(9, outputs=1, pages=5, tenant="x")
    target.add([running])
    step(target)
    passing = Work(9, tenant="x")
    target.add([large, passing])
    assert step(target) == [running, passing]
    assert [step(target) for _ in range(2)] == [[running], [large]]


def test_a_large_generation_has_its_turn_beside_small_ones_of_another_tenant():
    target = scheduler(slots=9, pages=5)
    large = Work(1, outputs=1, pages=5, tenant="large")
    target.add([Work(1, outputs=2, pages=2, tenant="small") for _ in range(2)])
    step(target)
    target.add([large])
    for _ in range(8):
        target.add([Work(1, outputs=2, pages=2, tenant="small")])
        step(target)
    assert large.finished


def test_what_runs_in_parts_is_among_those_that_run():
    target, long = scheduler(), Work(24)
    target.add([long, Work(1)])
    step(target)
    assert long in target.sequences("a")
    assert target.running() == [long]


work = st.builds(
    Work,
    st.integers(1, 15),
    st.integers(0, 4),
    st.sampled_from("ab"),
    st.sampled_from([None, "x", "y"]),
    priority=st.integers(-1, 1),
    cancelled=st.booleans(),
    pages=st.integers(1, 6),
)


def tokens_of(item: Work, done: int, run: int) -> int:
    """What a step ran of it, from where it was before."""
    if done:
        return 1
    return item.run - run if item.run else item.length


@given(
    st.lists(st.lists(work, max_size=4), max_size=12),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([1, 8, 1000]),
)
def test_limits_hold_and_nothing_is_left_waiting(arrivals, budget, slots, share):
    target = scheduler("ab", budget=max(budget, slots), share=share, slots=slots, pages=6)
    everything: list[Work] = []
    for arriving in [*arrivals, *[[]] * 400]:
        everything += arriving
        for item in arriving:
            target.add([item])
        target.drop_cancelled()
        before = {item: (item.done, item.run) for item in everything}
        batch = step(target)
        assert not any(item.cancelled for item in batch)
        assert len({item.base for item in batch}) <= 1
        assert sum(item.outputs > 0 for item in batch) <= slots
        assert sum(item.num_pages for item in batch) <= 6
        spent = [tokens_of(item, *before[item]) for item in batch]
        assert min(spent, default=1) >= 1
        assert sum(spent) <= max(budget, slots) or spent[-1] == 1
    assert all(item.finished or item.cancelled for item in everything)


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 40))
def test_classifications_start_in_the_order_of_their_arrival(lengths, budget):
    target = scheduler(budget=budget)
    works = [Work(length) for length in lengths]
    for item in works:
        target.add([item])
    started = [item for _ in range(1000) for item in step(target)]
    assert list(dict.fromkeys(started)) == works
