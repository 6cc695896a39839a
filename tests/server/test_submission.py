"""How long a request may take."""

from __future__ import annotations

import json
from threading import Event

import httpx
import pytest

from server.submission import Submission
from tests.server.looks import LONG, idle, running, waiting

SOON = {"x-request-timeout": "1"}


def post(live, path: str, body: dict, headers: dict[str, str] = SOON) -> httpx.Response:
    return live.http.post(path, json=body, headers=headers)


def test_a_request_that_waits_too_long_leaves_the_queue(live, threads, brake):
    held = brake(live, "enc")
    first = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)
    late = post(live, "/v1/classify", {"model": "mood", "input": ["w2", "w3"]})
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    held.release()
    assert first.result().status_code == 200
    held.until(lambda: idle(live))
    assert len(held.batches) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_that_takes_too_long_stops_within_a_step(live, threads, brake, stream):
    held = brake(live, "dec")
    late = post(live, "/v1/completions", {"model": "writer", "prompt": "w1", "stream": stream, **LONG})
    assert late.status_code == 504
    [sequence] = held.batches[0]
    held.release()
    held.until(lambda: idle(live))
    assert len(sequence.output_ids) <= 1
    assert len(held.batches) == 1


def test_a_stream_that_takes_too_long_ends_with_an_event(live, brake, monkeypatch):
    held, go, timers = brake(live, "dec"), Event(), []
    original, expire_at = held._run, Submission.expire_at
    monkeypatch.setattr(
        Submission, "expire_at", lambda self, _: (expire_at(self, 1e9), timers.append(self._timer))
    )

    def run(sequences, part_tokens):
        if sequences[0].output_ids:
            # The first token is on its way: now the time is over.
            live.engine._loop.call_soon_threadsafe(timers[0]._run)
            assert go.wait(60)
        return original(sequences, part_tokens)

    held._run = run
    held.release()
    late = live.complete(model="writer", prompt="w1", stream=True, **LONG)
    assert late.status_code == 200
    *events, error, done, _ = late.text.split("\n\n")
    assert len(events) == 1
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert done == "data: [DONE]"
    go.set()
    held.until(lambda: idle(live))
    assert len(held.batches) == 2


def assert_all_late(live, threads, bodies: dict[str, dict]) -> None:
    """None of the requests, which all wait at the same time, is done in its time."""
    asked = [threads.submit(post, live, path, body) for path, body in bodies.items()]
    assert [future.result().status_code for future in asked] == [504] * len(bodies)


def test_other_dialects_have_the_same_deadline(live, threads, brake):
    held = brake(live, "enc")
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}
    bodies = {
        "/tei/mood/predict": {"inputs": "w1"},
        "/v2/models/mood/infer": {"inputs": [tensor]},
        "/classify": {"model": "mood", "input": "w1"},
    }
    assert_all_late(live, threads, bodies)
    held.release()
    held.until(lambda: waiting(live, "enc") + running(live) == 0)


def test_waiting_for_a_tokenizer_counts(live, threads, monkeypatch):
    monkeypatch.setattr("server.routes.prompts.SHORT_CHARACTERS", 0)
    go, started = Event(), []
    pool = live.engine._pool._executor

    def occupy():
        started.append(1)
        assert go.wait(60)

    busy = [pool.submit(occupy) for _ in range(live.engine.settings.pool_threads)]
    bodies = {
        "/v1/classify": {"model": "mood", "input": "w1"},
        "/v1/chat/completions": {"model": "writer", "messages": [{"role": "user", "content": "w1"}]},
        "/tokenize": {"model": "dec", "prompt": "w1"},
        "/detokenize": {"model": "dec", "tokens": [5]},
    }
    assert_all_late(live, threads, bodies)
    go.set()
    for future in busy:
        future.result()
    assert post(live, "/v1/classify", {"model": "mood", "input": "w1"}, {}).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"x-request-timeout": "60"}])
def test_the_servers_limit_holds_whatever_the_client_would_wait(settings, start, brake, headers):
    live = start(settings.model_copy(update={"max_request_seconds": 1}))
    brake(live, "enc")
    assert post(live, "/v1/classify", {"model": "mood", "input": "w1"}, headers).status_code == 504


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "86400.5", ""])
def test_a_timeout_out_of_range_is_refused_by_name(live, value):
    headers = {"x-request-timeout": value}
    answer = post(live, "/v1/classify", {"model": "mood", "input": "w1"}, headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout"


def test_a_timeout_within_the_limit_is_taken(live):
    headers = {"x-request-timeout": "86400"}
    assert post(live, "/v1/classify", {"model": "mood", "input": "w1"}, headers).status_code == 200
