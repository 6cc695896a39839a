from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ServiceError
from server.scheduler import Scheduler


@dataclass(eq=False)
class Work:
    """A prompt of `length` tokens, followed by `outputs` generated ones; 0 is a classification."""

    length: int
    outputs: int = 0
    base: str = "a"
    tenant: str | None = None
    done: int = 0
    cancelled: bool = False

    @property
    def needs_slot(self) -> bool:
        return self.outputs > 0

    @property
    def num_new_tokens(self) -> int:
        return 1 if self.done else self.length

    @property
    def finished(self) -> bool:
        return self.done > 0 and self.done >= self.outputs


def scheduler(bases="a", *, budget=10, share=1000, slots=2, queue=100) -> Scheduler[Work]:
    return Scheduler(
        bases, max_batch_tokens=budget, max_tenant_tokens=share, max_sequences=slots, max_queue=queue
    )


def step(target: Scheduler[Work]) -> list[Work]:
    """Run one step; returns the batch."""
    batch = target.schedule()
    if batch is None:
        return []
    for work in batch.sequences:
        work.done += 1
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


def test_a_prompt_longer_than_the_budget_runs_alone():
    target, works = scheduler(), [Work(50), Work(1)]
    target.add(works)
    assert step(target) == works[:1]
    assert step(target) == works[1:]


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


def test_cancelled_work_is_dropped_waiting_or_running():
    target = scheduler()
    works = [Work(1, outputs=9), Work(1, outputs=9), Work(1, outputs=9)]
    target.add(works)
    step(target)
    works[0].cancelled = works[2].cancelled = True
    assert target.drop_cancelled() == [works[0]]
    assert (target.num_running("a"), target.num_waiting("a")) == (1, 0)
    assert step(target) == [works[1]]


def test_drop_all_returns_everything():
    target, works = scheduler("ab"), [Work(1, outputs=9), Work(20)]
    target.add(works)
    step(target)
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
    assert [(work.tenant, work.length) for work in step(target)] == [("x", 4), ("x", 4)]
    assert [(work.tenant, work.length) for work in step(target)] == [("x", 4)]
    assert target.schedule() is None


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


work = st.builds(
    Work,
    st.integers(1, 15),
    st.integers(0, 4),
    st.sampled_from("ab"),
    st.sampled_from([None, "x", "y"]),
    cancelled=st.booleans(),
)


@given(st.lists(st.lists(work, max_size=4), max_size=12), st.integers(1, 12), st.integers(1, 3))
def test_limits_hold_and_nothing_is_left_waiting(arrivals, budget, slots):
    target = scheduler("ab", budget=max(budget, slots), slots=slots)
    everything: list[Work] = []
    for arriving in [*arrivals, *[[]] * 400]:
        everything += arriving
        for item in arriving:
            target.add([item])
        target.drop_cancelled()
        before = {item: item.done for item in everything}
        batch = step(target)
        prompts = [item for item in batch if before[item] == 0]
        decoding = [item for item in batch if before[item] > 0]
        assert not any(item.cancelled for item in batch)
        assert len({item.base for item in batch}) <= 1
        assert sum(item.needs_slot for item in batch) <= slots
        tokens = sum(item.length for item in prompts) + len(decoding)
        assert tokens <= max(budget, slots) or len(prompts) == 1
    assert all(item.finished or item.cancelled for item in everything)


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 40))
def test_classifications_start_in_the_order_of_their_arrival(lengths, budget):
    target = scheduler(budget=budget)
    works = [Work(length) for length in lengths]
    for item in works:
        target.add([item])
    started = [item for _ in works for item in step(target)]
    assert started == works
