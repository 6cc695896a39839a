from __future__ import annotations

import openai
import pytest

MESSAGES = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]
GREEDY = {"temperature": 0, "max_completion_tokens": 10}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_prompt_is_the_chat_template(live):
    # The template of the test tokenizer joins the contents with spaces; it writes no <bos>.
    answer = live.chat(model="writer", messages=MESSAGES, return_routes=True, **GREEDY).json()
    same = live.complete(model="writer", prompt=[5, 6, 7], temperature=0, max_tokens=10, return_routes=True)
    [choice], [expected] = answer["choices"], same.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected["text"]}
    assert choice["routes"] == expected["routes"]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 10,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_openais_client_gets_the_same_whole_and_streamed(client):
    arguments = {"model": "writer", "messages": MESSAGES, "temperature": 0, "max_tokens": 10}
    whole = client.chat.completions.create(**arguments)
    stream = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert {chunk.adapter_digest for chunk in chunks} == {whole.adapter_digest}


def test_choices_come_side_by_side_whole_and_streamed(client):
    arguments = {"model": "writer", "messages": MESSAGES, "seed": 2, "max_tokens": 6, "n": 3}
    arguments |= {"presence_penalty": 1.0, "frequency_penalty": -0.5, "logit_bias": {"20": 1}}
    whole = client.chat.completions.create(**arguments)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage.prompt_tokens == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**arguments, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in whole.choices]


def test_openais_streaming_helper_follows_the_text(client):
    arguments = {"model": "poet", "messages": MESSAGES, "seed": 1, "max_tokens": 5}
    whole = client.chat.completions.create(**arguments)
    with client.chat.completions.stream(**arguments) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "content.delta"]
    assert snapshots[-1] == whole.choices[0].message.content


def test_log_probabilities_in_openais_shape(client):
    answer = client.chat.completions.create(
        model="writer", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert "".join(f" {token.token}" for token in content) == answer.choices[0].message.content
    for token in content:
        assert token.bytes == list(token.token.encode())
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob


def test_content_can_come_in_parts(live):
    parts = [{"type": "text", "text": "w2"}, {"type": "text", "text": " w3"}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]
    answers = [live.chat(model="writer", messages=m, **GREEDY).json() for m in (messages, MESSAGES)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_without_a_limit_the_context_is_filled(live):
    answer = live.chat(model="writer", messages=MESSAGES, temperature=0, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 96


def test_a_base_without_a_chat_template_says_so(live, monkeypatch):
    tokenizer = live.engine.bases["dec"].tokenization._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", None)
    response = live.chat(model="dec", messages=MESSAGES)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_a_refusal_of_the_template_is_the_callers(live, monkeypatch):
    tokenizer = live.engine.bases["dec"].tokenization._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    response = live.chat(model="dec", messages=MESSAGES)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages"
    assert "roles must alternate" in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name", "unsupported"),
        ({"messages": [{"role": "user", "content": "w1 " * 100}]}, "messages", "100 tokens"),
        ({"tools": []}, "tools", "unsupported parameter"),
        ({"top_logprobs": 2}, None, "only with logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, None, "give one"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"model": "mood"}, "model", "/v1/classify"),
    ],
)
def test_bad_bodies_are_refused_by_field(live, changes, param, words):
    response = live.chat(**({"model": "writer", "messages": MESSAGES} | changes))
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
