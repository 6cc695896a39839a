"""Requests go out when they are due, each ends in one way, and latencies are what the server took."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from itertools import pairwise
from time import perf_counter

import httpx
import numpy as np
import pytest

from loadtests.client import Client, Outcome, connection_pool
from loadtests.dialects import Results, is_embedding, make_dialect
from loadtests.experiment import Block
from loadtests.latency import latencies, percentiles
from loadtests.loops import closed_loop, open_loop
from loadtests.schedule import Planned

TEXT = "A warm, funny film."


def plan(due, models):
    return [Planned(float(time), model, TEXT) for time, model in zip(due, models, strict=True)]


def run(url, loop, dialect="molex-classify", timeout=60.0):
    """Run one loop with a client of its own."""

    async def session():
        async with connection_pool(url) as http:
            max_tokens = 3 if dialect == "openai-completions" else None
            spoken = make_dialect(dialect, max_tokens) if isinstance(dialect, str) else dialect
            return await loop(Client(http, spoken, timeout))

    return asyncio.run(session())


def send_all(url, planned, **options):
    return run(url, lambda client: open_loop(client, planned), **options)


def test_percentiles_are_those_of_the_server(stub, url):
    def measured_and_expected():
        stub.seconds.clear()
        models = np.random.default_rng(0).permutation(["300ms"] * 130 + ["450ms"] * 58 + ["600ms"] * 12)
        results = send_all(url, plan(np.linspace(0.3, 4.3, 200), models.tolist()))
        assert len(stub.seconds) == 200
        measured = percentiles(latencies(Block(0, 50, "stub", 4.3, results), "total"))
        return measured, percentiles(np.array(stub.seconds))

    # A machine that is busy delays answers now and then; a generator that is wrong is wrong each time.
    attempts = (measured_and_expected() for _ in range(4))
    assert any(measured == pytest.approx(expected, rel=0.05) for measured, expected in attempts)


def test_requests_in_flight_have_connections_of_their_own_which_are_used_again(stub, url):
    stub.crowd_size = 8

    async def together_then_one_by_one(client):
        together = await open_loop(client, plan([0] * 8, ["crowd"] * 8))
        return together + await closed_loop(client, plan([0] * 20, ["0ms"] * 20), 1, 60)

    results = run(url, together_then_one_by_one)
    assert [result.outcome for result in results] == [Outcome.OK] * 28
    together, later = set(stub.callers[:8]), set(stub.callers[8:])
    assert (len(together), len(later)) == (8, 1)
    assert later <= together


def test_requests_go_out_while_the_server_stalls(stub, url):
    """The server answers nobody until all have come: a closed loop would wait for ever."""
    stub.crowd_size = 40
    due = np.linspace(0.1, 1.1, 40)
    results = send_all(url, plan(due, ["crowd"] * 40))
    assert [result.outcome for result in results] == [Outcome.OK] * 40
    first, last = results[0], results[-1]
    assert first.end - first.due >= last.sent - first.due >= last.due - first.due
    assert all(result.sent >= result.due for result in results)
    assert [result.due for result in results] == due.tolist()


def test_latency_counts_from_the_due_time(url):
    """Both are due at once, but the generator gets to the second only later."""
    results = send_all(url, plan([-0.5, -0.5], ["0ms", "0ms"]))
    total = latencies(Block(0, 1, "stub", 1, results), "total")
    assert total.min() >= 0.5
    assert total == pytest.approx([result.end + 0.5 for result in results])


def test_every_request_ends_in_one_way_and_is_counted_once(stub, url):
    models = ["0ms", "503", "429", "never", "cut", "garbage", "empty"] * 8
    results = send_all(url, plan(np.linspace(0, 0.5, len(models)), models), timeout=3.0)
    assert [result.model for result in results] == models
    assert stub.received == Counter(models)
    found = {(result.model, result.outcome, result.status) for result in results}
    assert found == {
        ("0ms", Outcome.OK, 200),
        ("503", Outcome.HTTP_ERROR, 503),
        ("429", Outcome.HTTP_ERROR, 429),
        ("never", Outcome.TIMEOUT, None),
        ("cut", Outcome.TRANSPORT_ERROR, 200),
        ("garbage", Outcome.BAD_ANSWER, 200),
        ("empty", Outcome.BAD_ANSWER, 200),
    }


def test_a_refused_connection_is_a_transport_error():
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        results = send_all(f"http://127.0.0.1:{bound.getsockname()[1]}", plan([0, 0], ["0ms", "0ms"]))
    assert [(r.outcome, r.status) for r in results] == [(Outcome.TRANSPORT_ERROR, None)] * 2


def test_a_redirect_is_not_followed(url):
    (result,) = send_all(url, plan([0], ["307"]))
    assert (result.outcome, result.status) == (Outcome.HTTP_ERROR, 307)


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("molex-classify", {"input": [TEXT]}),
        ("infinity-classify", {"input": [TEXT]}),
        ("infinity-embeddings", {"input": [TEXT]}),
        ("openai-embeddings", {"input": [TEXT]}),
        ("openai-completions", {"prompt": TEXT, "stream": True, "max_tokens": 3, "temperature": 0}),
    ],
)
def test_dialects(dialect, body, stub, url):
    models = ["0ms", "503", "cut", "garbage", "empty"]
    results = send_all(url, plan([0] * 5, models), dialect=dialect)
    assert [result.outcome for result in results] == [
        Outcome.OK,
        Outcome.HTTP_ERROR,
        Outcome.TRANSPORT_ERROR,
        Outcome.BAD_ANSWER,
        Outcome.BAD_ANSWER,
    ]
    assert body | {"model": "0ms"} in stub.bodies


@pytest.mark.parametrize(
    ("path", "model", "outcome"),
    [
        ("/v1/embeddings", "0ms", Outcome.OK),
        ("/v1/embeddings", "empty", Outcome.BAD_ANSWER),
        ("/v1/classify", "0ms", Outcome.BAD_ANSWER),
    ],
)
def test_lines_can_be_texts_of_their_own(path, model, outcome, stub, url):
    planned = [Planned(0.0, model, "one\ntwo\nthree")]
    (result,) = send_all(url, planned, dialect=Results(path, is_embedding, num_texts=3))
    assert stub.bodies == [{"model": model, "input": ["one", "two", "three"]}]
    assert result.outcome is outcome


def test_servers_say_where_the_time_went(url):
    told, untold, wrong = send_all(url, plan([0] * 3, ["stages", "0ms", "nonsense"]))
    assert told.stages == {"in queue": 0.002, "in pass": 0.005}
    assert untold.stages == {}
    assert wrong.outcome is Outcome.BAD_ANSWER


def test_pieces_of_a_stream_get_the_times_at_which_they_came():
    """The reader asks for the next part of the answer only when it has looked at the last one."""
    given, asked_for_more = [], []

    async def parts():
        for text in ["a", " b", " c"]:
            given.append(perf_counter())
            yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n".encode()
            asked_for_more.append(perf_counter())
        yield b"data: [DONE]\n\n"

    async def send():
        transport = httpx.MockTransport(lambda request: httpx.Response(200, content=parts()))
        async with httpx.AsyncClient(base_url="http://stub", transport=transport) as http:
            return await Client(http, make_dialect("openai-completions", 3), 60).send(planned, start=0.0)

    (planned,) = plan([0], ["m"])
    result = asyncio.run(send())
    assert len(result.pieces) == 3
    moments = zip(given, result.pieces, asked_for_more, strict=True)
    assert all(before <= piece <= after for before, piece, after in moments)


def test_tokens_of_streams_are_timed_from_the_due_time_and_from_each_other(stub, url):
    results = send_all(url, plan([0.1] * 5, ["50ms"] * 5), dialect="openai-completions")
    block = Block(0, 5, "stub", 1, results)
    assert [len(result.pieces) for result in results] == [3] * 5
    assert all(result.due < result.pieces[0] < result.pieces[-1] <= result.end for result in results)
    assert latencies(block, "first token").tolist() == [result.pieces[0] - result.due for result in results]
    gaps = [later - earlier for result in results for earlier, later in pairwise(result.pieces)]
    assert latencies(block, "between tokens").tolist() == gaps


def test_a_closed_loop_keeps_its_callers_busy(stub, url):
    """Two callers share the plan; neither sends before its last request is back."""
    results = run(url, lambda client: closed_loop(client, plan([0] * 9, ["1ms"] * 9), 2, seconds=60))
    assert stub.received["1ms"] == len(results) == 9
    for result in results:
        others = sum(other.sent < result.sent < other.end for other in results)
        assert others <= 1


def test_a_closed_loop_stops_in_time(url):
    results = run(url, lambda client: closed_loop(client, plan([0] * 10_000, ["50ms"] * 10_000), 2, 0.5))
    assert 2 <= len(results) <= 20
