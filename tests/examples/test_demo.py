"""The demo notices what a server can do wrong. tests/test_readme.py sends its requests to a real one."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from examples.demo import DemoError, classify, console, generate, generation_table

CLASSIFIED = {
    "adapter_digest": "sha256:12",
    "data": [{"label": "positive", "probs": [0.25, 0.75], "routes": [3, [1, 4]]}],
}
TIMES = {"x-queue-time": "0.1", "x-inference-time": "2.5", "x-total-time": "3"}


def client(response: httpx.Response) -> httpx.AsyncClient:
    """A client to a server that gives one answer to everything."""
    return httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(lambda _: response))


def classified(status: int = 200, **changes):
    http = client(httpx.Response(status, json=CLASSIFIED | changes, headers=TIMES))
    return asyncio.run(classify(http, "mood", "fine"))


def chunk(text: str, **extra):
    return {"adapter_digest": "sha256:12", "usage": None, "choices": [{"text": text, **extra}]}


LAST = chunk("", routes=[2])
USAGE = {"adapter_digest": "sha256:12", "choices": [], "usage": {"completion_tokens": 2}}


def generated(*events, done: bool = True, status: int = 200):
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
    http = client(httpx.Response(status, text="".join(lines)))
    return asyncio.run(generate(http, "/v1/completions", "hello", {"model": "poet", "prompt": "hello"}))


def test_a_complete_classification():
    answer = classified()
    assert (answer.label, answer.probability, answer.routes) == ("positive", 0.75, [3, [1, 4]])
    assert (answer.queue, answer.forward, answer.total) == (0.1, 2.5, 3.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": 503}, "status 503"),
        ({"adapter_digest": ""}, "no digest"),
        ({"data": []}, "0 answers"),
        ({"data": [CLASSIFIED["data"][0] | {"probs": [0.2, 0.2]}]}, "sum to 1"),
    ],
    ids=["status", "digest", "count", "probabilities"],
)
def test_a_classification_that_is_off(changes, words):
    with pytest.raises(DemoError, match=words):
        classified(**changes)


def test_a_complete_generation():
    answer = generated(chunk("Hel"), chunk("lo"), LAST, USAGE)
    assert (answer.text, answer.routes, answer.tokens) == ("Hello", [2], 2)
    assert 0 < answer.first_token <= answer.total


@pytest.mark.parametrize(
    ("events", "options", "words"),
    [
        ([chunk("x"), LAST, USAGE], {"status": 429}, "status 429"),
        ([chunk("x"), LAST, USAGE], {"done": False}, "broke off"),
        ([chunk("x"), {"error": {"message": "internal"}}], {}, "internal"),
        ([chunk("x") | {"adapter_digest": None}, LAST, USAGE], {}, "no digest"),
        ([LAST, USAGE], {}, "no text"),
        ([chunk("x"), USAGE], {}, "no last chunk"),
        ([chunk("x"), LAST], {}, "no last chunk"),
    ],
    ids=["status", "broken off", "error", "digest", "empty", "no end", "no usage"],
)
def test_a_generation_that_is_off(events, options, words):
    with pytest.raises(DemoError, match=words):
        generated(*events, **options)


def test_text_of_a_model_is_not_read_as_markup(capsys):
    console.print(generation_table([generated(chunk("a [red]dish[/oops]"), LAST, USAGE)]))
    assert "[red]dish[/oops]" in capsys.readouterr().out
