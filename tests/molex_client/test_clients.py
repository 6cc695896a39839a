"""Both clients against a running server."""

from __future__ import annotations

import asyncio
import inspect

import httpx
import pytest

from molex_client import (
    AsyncClient,
    ChatOptions,
    Client,
    CompletionOptions,
    InvalidRequestError,
    NotFoundError,
)
from molex_client.api import Api
from server.generation_schemas import ChatRequest, CompletionRequest
from server.sequence import Sequence
from tests.molex_client.conftest import answer

PROMPT = "w1 w2 w3"
GREEDY = {"temperature": 0.0, "max_tokens": 8}


def said(response: httpx.Response) -> dict:
    content = response.json()
    return {name: content[name] for name in content.keys() - {"id", "created"}}


def same(answer, response: httpx.Response) -> bool:
    """Whether an answer has all that a response to the same request says, but what is new each time."""
    content = answer.model_dump(exclude_unset=True)
    expected = said(response)
    return {name: content.get(name) for name in expected if name != "object"} == _without_objects(expected)


def _without_objects(value):
    """OpenAI's `object` says of each thing what it is; the types do so here."""
    if isinstance(value, dict):
        return {name: _without_objects(item) for name, item in value.items() if name != "object"}
    return [_without_objects(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("inputs", ["w1 w2", ["w1", "w2 w3"], [("w1", "w2"), "w3"]])
def test_texts_and_pairs_are_classified(call, live, inputs):
    got = call(live.url, "classify", "mood", inputs, return_routes=True)
    assert same(got, live.classify(model="mood", input=inputs, return_routes=True))
    assert len(got.data[0].routes) == 3


def test_texts_are_embedded(call, live):
    got = call(live.url, "embed", "enc", ["w1", "w2"])
    assert same(got, live.embed(model="enc", input=["w1", "w2"]))


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "w4"], [5, 6], [[5, 6], [7]]])
def test_prompts_are_continued(call, live, prompt):
    options = {**GREEDY, "logprobs": 2, "return_routes": True}
    got = call(live.url, "complete", "writer", prompt, **options)
    expected = live.complete(model="writer", prompt=prompt, **options)
    assert [choice.text for choice in got.choices] == [c["text"] for c in expected.json()["choices"]]
    assert got.choices[0].model_dump() == expected.json()["choices"][0]
    assert got.adapter_digest == expected.json()["adapter_digest"]


def test_a_stream_brings_the_same_text_in_pieces(call, live):
    options = {**GREEDY, "stream_options": {"include_usage": True}}
    *pieces, last = call(live.url, "stream_completion", "writer", PROMPT, **options)
    whole = call(live.url, "complete", "writer", PROMPT, **GREEDY)
    assert len(pieces) > 2
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_conversations_are_answered_whole_and_in_pieces(call, live):
    messages = [{"role": "user", "content": PROMPT}]
    options = {**GREEDY, "logprobs": True, "top_logprobs": 2}
    whole = call(live.url, "chat", "poet", messages, **options)
    expected = live.chat(model="poet", messages=messages, **options).json()
    assert whole.choices[0].model_dump(exclude_unset=True) == expected["choices"][0]
    pieces = call(live.url, "stream_chat", "poet", messages, **options)
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content


def test_models_are_listed_and_found(call, live):
    models = {model.id: model for model in call(live.url, "list_models")}
    assert models["mood"].parent == "enc"
    assert call(live.url, "get_model", "dec") == models["dec"]
    with pytest.raises(NotFoundError) as caught:
        call(live.url, "get_model", "none")
    assert caught.value.code == "model_not_found"


def test_the_server_is_found_well(call, live, monkeypatch):
    assert call(live.url, "is_alive")
    assert call(live.url, "is_ready")
    monkeypatch.setattr(live.engine, "draining", True)
    assert not call(live.url, "is_ready")


def test_something_else_is_not_found_well(call, script):
    script.answers = [answer(404)]
    with pytest.raises(NotFoundError):
        call(script.url, "is_ready")


def test_a_refused_field_is_named(call, live):
    with pytest.raises(InvalidRequestError) as caught:
        call(live.url, "complete", "writer", PROMPT, temperature=3)
    assert (caught.value.status, caught.value.param) == (400, "temperature")
    with pytest.raises(InvalidRequestError, match="temperature"):
        call(live.url, "stream_completion", "writer", PROMPT, temperature=3)


@pytest.fixture
def stopped_early(live, monkeypatch):
    """Whether the one generation of a test ended because its client left, held back after its first token."""
    seen: set[Sequence] = set()
    runner = live.engine.bases["dec"].runner
    run = runner.run

    def held(sequences, part_tokens):
        [sequence] = sequences
        seen.add(sequence)
        if len(sequence.output_ids) == 1:
            happens(live, lambda: sequence.cancelled)
        return run(sequences, part_tokens)

    def told() -> bool:
        [sequence] = seen
        assert happens(live, lambda: sequence.cancelled)
        assert happens(live, lambda: live.metrics()['molex_running_sequences{base="dec"}'] == 0)
        return len(sequence.output_ids) <= 2

    monkeypatch.setattr(runner, "run", held)
    return told


def happens(live, condition, looks=2000) -> bool:
    """Whether another thread does something soon; each look takes one round trip to the server."""
    for _ in range(looks):
        if condition():
            return True
        live.http.get("/livez")
    return False


LONG = {"max_tokens": 90, "ignore_eos": True, "temperature": 0.0}


def test_leaving_a_loop_over_a_stream_ends_the_work(live, stopped_early):
    with Client(live.url) as client:
        for piece in client.stream_completion("writer", PROMPT, **LONG):
            assert piece.choices
            break
        assert stopped_early()


def test_leaving_with_ends_the_work_though_the_stream_lives_on(live, stopped_early):
    with Client(live.url) as client:
        with client.stream_completion("writer", PROMPT, **LONG) as stream:
            pieces = iter(stream)
            assert next(pieces).choices
        assert stopped_early()


def test_leaving_an_async_stream_ends_the_work(live, stopped_early):
    async def leave() -> None:
        async with AsyncClient(live.url) as client:
            async with await client.stream_completion("writer", PROMPT, **LONG) as stream:
                pieces = aiter(stream)
                assert (await anext(pieces)).choices
            assert await asyncio.to_thread(stopped_early)

    asyncio.run(leave())


def test_many_calls_share_an_async_client(live):
    async def ask() -> list[str]:
        async with AsyncClient(live.url) as client:
            answers = await asyncio.gather(*(client.classify("mood", f"w{n}") for n in range(20)))
        return [answer.data[0].label for answer in answers]

    with Client(live.url) as client:
        assert asyncio.run(ask()) == [client.classify("mood", f"w{n}").data[0].label for n in range(20)]


def test_both_clients_have_every_call():
    calls = {name for name, item in vars(Api).items() if inspect.isfunction(item) and name[0] != "_"}
    assert calls
    for name in calls:
        blocking = getattr(Client, name)
        assert blocking.__doc__ == getattr(AsyncClient, name).__doc__
        assert blocking.__doc__


def test_options_are_those_of_the_server():
    fixed = {"model", "stream"}
    for options, body, prompt in (
        (CompletionOptions, CompletionRequest, {"prompt", "best_of", "suffix"}),
        (ChatOptions, ChatRequest, {"messages", "max_completion_tokens"}),
    ):
        assert set(options.__annotations__) == set(body.model_fields) - fixed - prompt


def test_the_key_is_sent_and_shown_to_nobody(call, script, monkeypatch):
    monkeypatch.setenv("MOLEX_KEY", "from-environment")
    script.answers = [answer(401), answer(401)]
    for options, key in (({}, "from-environment"), ({"key": "given"}, "given")):
        with pytest.raises(Exception, match="401") as caught:
            call(script.url, "list_models", options=options)
        assert f"authorization: bearer {key}" in script.heads[-1]
        assert key not in repr(caught.value)
    for kind in (Client, AsyncClient):
        assert repr(kind("http://host", "secret")) == f"{kind.__name__}('http://host')"


def test_a_password_in_the_url_is_refused_unseen():
    with pytest.raises(ValueError, match="user name") as caught:
        Client("http://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


def test_without_a_key_none_is_sent(call, script, monkeypatch):
    monkeypatch.delenv("MOLEX_KEY", raising=False)
    script.answers = [answer(200, {"data": []})]
    call(script.url, "list_models")
    assert "authorization" not in script.heads[0]


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "ключ"])
def test_a_key_that_cannot_be_one_is_refused_unseen(key):
    with pytest.raises(ValueError, match="API key") as caught:
        Client("http://host", key)
    assert key not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_a_url_without_a_server_is_refused(url):
    with pytest.raises(ValueError, match="is no URL"):
        Client(url)


@pytest.mark.parametrize("name", ["", ".", "..", "../keys/x", "a//b", "a/"])
def test_a_name_never_leads_to_another_route(name):
    with Client("http://127.0.0.1:1") as client, pytest.raises(ValueError, match="is no name"):
        client.remove_adapter(name)


def test_a_path_before_the_routes_is_kept(script, call):
    script.answers = [answer(200, {"data": []})]
    call(f"{script.url}/behind/a/proxy", "list_models")
    assert script.heads[0].startswith("get /behind/a/proxy/v1/models ")
