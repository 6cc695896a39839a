"""Clients that go away at any moment: the others get right answers, and nothing is left of them."""

from __future__ import annotations

import gc
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import httpx
import pytest

from tests.server.conftest import Live
from tests.server.plain_client import plain_client

NAMES = {"writer-2": "writer", "poet-2": "poet", "mood-2": "mood"}
PROMPTS = ["w1 w2 w3", "w9", "w8 w7 w6 w5 w4", " ".join(f"w{n}" for n in range(70))]
WORKERS = 24
JSON = "application/json"


def request(name: str, prompt: str) -> tuple[str, dict[str, Any]]:
    if name == "mood-2":
        return "/v1/classify", {"model": name, "input": prompt}
    return "/v1/completions", {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 12}


def answer(live: Live, name: str, prompt: str) -> Any:
    path, body = request(name, prompt)
    with plain_client(live.url) as post:
        content, _ = post(path, body)
    if name == "mood-2":
        return content["data"][0]["label"]
    return content["choices"][0]["text"], content["usage"]["completion_tokens"]


def go_away(live: Live, chance: random.Random, name: str, prompt: str) -> None:
    """Leave with the request half sent, at once, or after some bytes of the answer."""
    path, body = request(name, prompt)
    body |= {} if name == "mood-2" else {"stream": chance.random() < 0.7, "max_tokens": 20}
    cut = chance.choice([0, 0, 0, 1, 30, 10_000])
    with live.send(path, body, cut=min(cut, 60)) as connection:
        for _ in range(0 if cut else chance.randint(0, 4)):
            connection.recv(chance.choice([1, 200, 4096]))


def free(live: Live) -> bool:
    """Whether nothing waits or runs and every page of the cache is free."""
    engine = live.engine
    runner = engine.bases["dec"].runner
    with engine._wake:
        left = [*engine._scheduler.waiting(), *engine._scheduler.running()]
    return not left and runner.num_free_pages == runner.num_pages


@pytest.mark.parametrize("clients", [80, pytest.param(2000, marks=pytest.mark.faults)])
def test_those_who_stay_are_answered_and_nothing_is_left_of_the_others(settings, start, clients):
    live = start(settings)
    for name, source in NAMES.items():
        assert live.load(name, source).status_code == 201
    expected = {(name, prompt): answer(live, name, prompt) for name in NAMES for prompt in PROMPTS}

    def come(number: int) -> str:
        chance = random.Random(number)
        what = chance.choice(list(NAMES)), chance.choice(PROMPTS)
        if chance.random() < 0.5:
            go_away(live, chance, *what)
            return "left"
        assert answer(live, *what) == expected[what]
        return "stayed"

    with ThreadPoolExecutor(WORKERS) as pool:
        counts = Counter(pool.map(come, range(clients)))
    assert min(counts["left"], counts["stayed"]) > clients / 4
    references = [ref(live.engine.adapters.weights(live.engine.adapters.get(name))) for name in NAMES]
    for name in NAMES:
        assert live.unload(name).status_code == 204

    def forgotten() -> bool:
        gc.collect()
        return free(live) and all(reference() is None for reference in references)

    # Each look takes a round trip to the server.
    assert any(forgotten() for _ in range(100) if live.http.get("/livez").status_code == 200)


@pytest.mark.parametrize(
    ("method", "path", "route", "media_type"),
    [
        ("POST", "/v1/classify", "/v1/classify", JSON),
        ("POST", "/tokenize", "/tokenize", JSON),
        ("POST", "/tei/mood/predict", "/tei/{model}/predict", JSON),
        ("POST", "/v2/models/mood/infer", "/v2/models/{model}/infer", JSON),
        ("POST", "/v2/repository/index", "/v2/repository/index", JSON),
        ("POST", "/v2/repository/models/x/load", "/v2/repository/models/{model}/load", JSON),
        ("POST", "/v2/repository/models/x/unload", "/v2/repository/models/{model}/unload", JSON),
        ("PUT", "/v1/adapters/x", "/v1/adapters/{name}", JSON),
        ("PUT", "/v1/adapters/x", "/v1/adapters/{name}", "multipart/form-data; boundary=b"),
    ],
)
def test_leaving_in_the_middle_of_a_body_is_no_fault_of_the_server(
    live, caplog, method, path, route, media_type
):
    def ends() -> dict[int, float]:
        samples = live.metrics()
        name = 'molex_requests_total{{route="{}",status="{}"}}'
        return {status: samples.get(name.format(route, status), 0) for status in (400, 499, 500)}

    before = ends()
    url = httpx.URL(live.url)
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {media_type}\r\n"
        connection.sendall(f"{head}content-length: 100\r\n\r\n".encode())
    # Each look takes a round trip to the server.
    after = next(counts for _ in range(1000) if (counts := ends()) != before)
    assert after == before | {499: before[499] + 1}
    assert not caplog.records
