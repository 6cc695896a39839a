"""Any order of loads, reloads, unloads, requests and disconnects, against a model of what is served."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any
from weakref import ReferenceType, ref

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from molex.adapter import Adapter
from tests.server.conftest import Live
from tests.server.named import write_named

NAMES = st.sampled_from(["a", "b", "c", "d"])
VERSIONS = st.sampled_from(["v0", "v1", "v2"])
MOST_HELD = 2
"""Requests that are held at a time. Their adapters leave room for one more among those in memory."""


class Scene:
    """A server with room for three adapters, whose encoder can be held at the beginning of a step."""

    def __init__(self, live: Live, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.live = live
        self.digests = digests
        self.pool = ThreadPoolExecutor(MOST_HELD)
        self.gate = Event()
        self.holds = False
        """Whether the worker stands at the gate: what has been admitted stays until it opens."""
        runner = live.engine.bases["enc"].runner
        run = runner.run

        def held(*arguments: Any) -> Any:
            self.holds = True
            assert self.gate.wait(60)
            self.holds = False
            return run(*arguments)

        monkeypatch.setattr(runner, "run", held)

        async def already_warm(*_: Any) -> None:
            """A worker that stands at the gate could not run a warm-up, which others test."""

        monkeypatch.setattr("server.registry.loads.warm_up", already_warm)

    def until(self, condition: Callable[[], bool], looks: int = 10_000) -> None:
        """Wait for what other threads are about to do; each look takes one round trip to the server."""
        for _ in range(looks):
            if condition():
                return
            self.live.http.get("/livez")
        raise AssertionError("it never happened")

    @property
    def admitted(self) -> list[bool]:
        """Whether each sequence of the encoder has been cancelled."""
        with self.live.engine._wake:
            return [sequence.cancelled for sequence in self.live.engine._scheduler.sequences("enc")]


class Lifecycle(RuleBasedStateMachine):
    """`served` is the model: the version that each name stands for."""

    scene: Scene

    def __init__(self) -> None:
        super().__init__()
        self.live = self.scene.live
        self.served: dict[str, str] = {}
        self.held: list[tuple[Future[httpx.Response], str]] = []
        self.left = 0
        self.references: list[ReferenceType[Adapter]] = []
        self.scene.gate.set()

    @property
    def under_way(self) -> int:
        return len(self.held) + self.left

    def all_are_held(self) -> bool:
        return self.scene.holds and len(self.scene.admitted) == self.under_way

    @rule(name=NAMES, version=VERSIONS)
    def load(self, name: str, version: str) -> None:
        answer = self.live.load(name, version)
        assert answer.status_code == (200 if name in self.served else 201)
        assert answer.json()["digest"] == self.scene.digests[version]
        self.served[name] = version
        weights = self.live.engine.adapters.weights(self.live.engine.adapters.get(name))
        self.references += [ref(weights)] if weights else []

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        assert self.live.unload(name).status_code == (204 if self.served.pop(name, None) else 404)

    @precondition(lambda self: not self.under_way)
    @rule(name=NAMES)
    def ask(self, name: str) -> None:
        answer = self.live.classify(model=name, input=["w1", "w2 w3"])
        if name in self.served:
            self.check(answer, self.served[name])
        else:
            assert answer.status_code == 404

    @precondition(lambda self: self.served and self.under_way < MOST_HELD)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """A request that is admitted now and answered after whatever follows."""
        name = data.draw(st.sampled_from(sorted(self.served)))
        self.scene.gate.clear()
        future = self.scene.pool.submit(self.live.classify, model=name, input="w1")
        self.held.append((future, self.served[name]))
        self.scene.until(self.all_are_held)

    @precondition(lambda self: self.served and self.under_way < MOST_HELD)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A request whose client goes away before the answer."""
        name = data.draw(st.sampled_from(sorted(self.served)))
        self.scene.gate.clear()
        with self.live.send("/v1/classify", {"model": name, "input": "w1"}):
            self.left += 1
            self.scene.until(self.all_are_held)
        self.scene.until(lambda: self.scene.admitted.count(True) == self.left)

    @precondition(lambda self: self.under_way)
    @rule()
    def finish(self) -> None:
        self.scene.gate.set()
        for future, version in self.held:
            self.check(future.result(), version)
        self.held, self.left = [], 0
        self.scene.until(lambda: self.scene.admitted == [])

    def check(self, answer: httpx.Response, version: str) -> None:
        """The answer is that of the version that its name stood for when it was admitted."""
        assert answer.status_code == 200, answer.text
        assert {entry["label"] for entry in answer.json()["data"]} == {version}
        assert answer.json()["adapter_digest"] == self.scene.digests[version]

    @invariant()
    def lists_tell_what_is_served(self) -> None:
        cards = self.live.http.get("/v1/adapters").json()["data"]
        assert {card["name"]: card["digest"] for card in cards} == {
            name: self.scene.digests[version] for name, version in self.served.items()
        }
        assert sum(card["resident"] for card in cards) <= 3

    def teardown(self) -> None:
        if self.under_way:
            self.finish()
        for name in list(self.served):
            self.unload(name)
        self.scene.until(self.forgotten, looks=30)

    def forgotten(self) -> bool:
        """Whether nothing holds the weights of any adapter that was there."""
        gc.collect()
        return all(reference() is None for reference in self.references)


@pytest.fixture
def scene(start, settings, models, tmp_path: Path, monkeypatch) -> Iterator[Scene]:
    digests = write_named(models["enc"].spec, tmp_path, 3)
    changes = {"adapters": None, "adapter_root": tmp_path, "max_resident_adapters": 3}
    scene = Scene(start(settings.model_copy(update=changes)), digests, monkeypatch)
    yield scene
    scene.gate.set()
    scene.pool.shutdown()


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.faults)])
def test_whatever_happens_what_is_served_is_what_was_asked_for(scene, examples):
    machine = type("Lifecycle", (Lifecycle,), {"scene": scene})
    how = settings(
        max_examples=examples,
        stateful_step_count=25,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=how)
