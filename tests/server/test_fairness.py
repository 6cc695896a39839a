"""What the flood of one tenant does to the waits of another, in a time that only steps take."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from server.scheduler import Scheduler
from tests.server.work import Work, run_batch

REQUESTS = 1000
BOUND = 2


@dataclass(frozen=True)
class Scene:
    """Requests of a light tenant, and callers of a flood that always have a request under way.

    The times of a step are like those of the demo bases on two cores.
    """

    step_seconds: float
    token_seconds: float
    light_per_second: float
    outputs: int
    callers: int
    texts: int
    """In each request of the flood."""


SCENES = {
    "classification": Scene(0.010, 0.0010, 10, outputs=0, callers=8, texts=8),
    "generation": Scene(0.010, 0.0025, 1, outputs=16, callers=24, texts=1),
    "generation, long": Scene(0.010, 0.0025, 0.25, outputs=64, callers=24, texts=1),
    "generation, nothing waits": Scene(0.010, 0.0025, 1, outputs=16, callers=8, texts=1),
    "generation, least flood": Scene(0.010, 0.0025, 1, outputs=16, callers=6, texts=1),
}


@dataclass(eq=False)
class Asked(Work):
    arrived: float = 0
    caller: int = 0


class Simulation:
    """A scheduler with the settings that a server has by default."""

    def __init__(self, scene: Scene) -> None:
        self.now = 0.0
        self.flood_served = 0
        self._scene = scene
        self._random = random.Random(0)
        self._unanswered: Counter[int] = Counter()
        self._scheduler: Scheduler[Asked] = Scheduler(
            {"a": 2048},
            max_batch_tokens=2048,
            max_tenant_tokens=128,
            max_sequences=16,
            max_queue=1024,
            clock=lambda: self.now,
        )

    def flood(self) -> None:
        """Let the flood begin."""
        for caller in range(self._scene.callers):
            self._call(caller)

    def waits(self) -> list[float]:
        """Seconds from the arrival of each request of the light tenant to its answer, shortest first."""
        arrivals = list(self._arrivals())
        waits: list[float] = []
        while len(waits) < REQUESTS:
            while arrivals and arrivals[0].arrived <= self.now:
                self._scheduler.add([arrivals.pop(0)])
            batch = self._scheduler.schedule()
            if batch is None:
                self.now = arrivals[0].arrived
                continue
            self.now += self._scene.step_seconds + self._scene.token_seconds * run_batch(batch)
            self._scheduler.postprocess(batch)
            ended = [asked for asked in batch.sequences if asked.finished]
            waits += [self.now - asked.arrived for asked in ended if asked.tenant == "light"]
            self._answer(asked.caller for asked in ended if asked.tenant == "flood")
        return sorted(waits)

    def _arrivals(self) -> Iterator[Asked]:
        at = 0.0
        for _ in range(REQUESTS):
            at += self._random.expovariate(self._scene.light_per_second)
            yield self._asked("light", arrived=at)

    def _call(self, caller: int) -> None:
        self._unanswered[caller] = self._scene.texts
        self._scheduler.add([self._asked("flood", caller=caller) for _ in range(self._scene.texts)])

    def _answer(self, callers: Iterator[int]) -> None:
        for caller in callers:
            self.flood_served += 1
            self._unanswered[caller] -= 1
            if not self._unanswered[caller]:
                self._call(caller)

    def _asked(self, tenant: str, *, arrived: float = 0, caller: int = 0) -> Asked:
        length = self._random.randint(12, 36)
        return Asked(length, self._scene.outputs, tenant=tenant, arrived=arrived, caller=caller)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_a_flood_does_not_double_the_p99_of_another_tenant_and_is_served_too(scene):
    quiet, flooded = Simulation(scene), Simulation(scene)
    flooded.flood()
    p99 = REQUESTS * 99 // 100 - 1
    assert flooded.waits()[p99] <= BOUND * quiet.waits()[p99]
    assert flooded.flood_served > REQUESTS
