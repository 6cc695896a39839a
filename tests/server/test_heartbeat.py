"""A worker that has died or is stuck."""

from __future__ import annotations

import os
from time import monotonic

import httpx
import pytest

from server import engine, heartbeat
from server.cli import app
from server.engine import IDLE_SECONDS
from server.heartbeat import BUSY_PATIENCE, BUSY_SECONDS, LOOK_SECONDS, LOST_SECONDS, Heartbeat
from server.settings import Settings
from tests.server.looks import LONG, idle
from tests.server.processes import started


def serve_without_a_worker(arguments: list[str]) -> None:
    """A server whose worker dies after its first step."""
    engine.Engine._postprocess = None
    heartbeat.LOST_SECONDS = 0
    app(arguments)


PATIENCE = 6


@pytest.fixture
def hurried(settings, start, monkeypatch):
    """A server whose looks, which count for as long as ever, follow each other faster, as idle rounds do.

    A worker counts as stuck after a second or so, which on a machine that is busy is none too long.
    """
    monkeypatch.setattr(engine, "LOOK_SECONDS", LOOK_SECONDS / 5)
    monkeypatch.setattr(engine, "IDLE_SECONDS", IDLE_SECONDS / 5)
    return start(settings.model_copy(update={"max_stall_seconds": PATIENCE}))


def look(target: Heartbeat, progress: int, seconds: float) -> None:
    for _ in range(int(seconds / LOOK_SECONDS)):
        target.look(progress, 1.0)


def test_it_is_stuck_after_standing_still_and_lost_long_after():
    target = Heartbeat(patience=4)
    look(target, 7, 4)
    assert not target.stuck
    target.look(7, 1.0)
    assert target.stuck
    assert not target.lost
    look(target, 7, LOST_SECONDS)
    assert target.lost


def test_it_is_stuck_within_five_seconds_by_default():
    """The last progress may come just after a look."""
    patience = Settings(bases=["a=/x"]).max_stall_seconds
    target = Heartbeat(patience)
    look(target, 7, 5 - LOOK_SECONDS)
    assert target.stuck


def test_any_progress_is_a_new_start():
    target = Heartbeat(patience=1)
    for progress in range(20):
        look(target, progress, 1)
        assert not target.stuck
    look(target, 19, 1)
    assert target.stuck
    target.look(20, 1.0)
    assert not target.stuck


def test_one_that_computes_has_more_time_but_not_for_ever():
    target = Heartbeat(patience=1)
    for number in range(int(BUSY_PATIENCE / LOOK_SECONDS)):
        target.look(3, number * BUSY_SECONDS * 2)
        assert not target.stuck
    look(target, 3, 2)
    assert target.stuck


def test_a_stuck_worker_leaves_nobody_waiting_and_may_come_back(hurried, threads, brake):
    live = hurried
    held = brake(live, "dec")
    body = {"model": "writer", "prompt": "w1", **LONG}
    asked = [threads.submit(live.complete, **body, stream=stream) for stream in (False, True)]
    held.until(lambda: len(held.batches) == 1)
    asked.append(threads.submit(live.classify, model="mood", input="w1"))
    for future in asked:
        assert future.result().status_code == 503
        assert future.result().json()["error"]["code"] == "worker_stuck"
    assert live.http.get("/livez").status_code == 200
    assert live.http.get("/readyz").status_code == 503
    refused = live.classify(model="mood", input="w1")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    held.release()
    held.until(lambda: live.http.get("/readyz").status_code == 200)
    held.until(lambda: idle(live))
    assert live.classify(model="mood", input="w1").status_code == 200


def test_a_worker_that_is_slow_is_not_stuck(hurried, monkeypatch):
    """Its step takes longer than the patience, but it goes on from layer to layer."""
    live = hurried
    runner, engine = live.engine.bases["enc"].runner, live.engine
    looks = []
    look_at = engine._heartbeat.look
    monkeypatch.setattr(engine._heartbeat, "look", lambda *seen: (look_at(*seen), looks.append(1)))
    progressed = runner._progressed

    def slow():
        seen = len(looks)
        progressed()
        while len(looks) < seen + 5:
            live.http.get("/livez")

    monkeypatch.setattr(runner, "_progressed", slow)
    assert live.classify(model="mood", input="w1").status_code == 200
    assert len(looks) * LOOK_SECONDS > 2 * PATIENCE


def test_a_worker_without_work_is_not_stuck(settings, start):
    live = start(settings.model_copy(update={"max_stall_seconds": 2}))
    beat = live.engine._heartbeat
    seen = live.engine._rounds
    while live.engine._rounds < seen + 3 / IDLE_SECONDS:
        assert live.http.get("/readyz").status_code == 200
    assert not beat.stuck


def seconds_until_not_ready(live) -> float:
    begin = monotonic()
    while live.http.get("/readyz").status_code == 200:
        assert monotonic() - begin < 60
    return monotonic() - begin


@pytest.mark.faults
def test_a_hung_worker_is_seen_within_five_seconds(settings, start, brake):
    """The best of three, since looks are late on a machine that is busy."""
    patience = Settings.model_fields["max_stall_seconds"].default
    seconds = []
    for _ in range(3):
        live = start(settings.model_copy(update={"max_stall_seconds": patience}))
        held = brake(live, "enc")
        with live.send("/v1/classify", {"model": "mood", "input": "w1"}):
            held.until(lambda held=held: len(held.batches) == 1)
            seconds.append(seconds_until_not_ready(live))
        held.release()
    assert min(seconds) < 5


@pytest.mark.faults
def test_a_dead_worker_is_seen_within_five_seconds(settings, start, monkeypatch):
    live = start(settings)
    monkeypatch.setattr(live.engine, "_postprocess", None)
    with live.send("/v1/classify", {"model": "mood", "input": "w1"}):
        assert seconds_until_not_ready(live) < 5


def test_a_process_whose_worker_has_died_ends(bases):
    options = ["--base", f"dec={bases['dec']}", "--max-stall-seconds", "1"]
    with started(os.environ, *options, program=serve_without_a_worker) as (child, [url, *_]):
        answer = httpx.post(f"{url}/v1/completions", json={"model": "dec", "prompt": "w1"}, timeout=60)
        assert answer.status_code == 500
        code, log = child.ended()
    assert code == 1
    assert "to be started anew" in log
