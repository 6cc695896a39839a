from __future__ import annotations

import json

import openai
import pytest

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = "w1 w2 w3"
USAGE = {
    "prompt_tokens": 4,
    "completion_tokens": 12,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 0},
}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def events(response) -> list[dict]:
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_greedy_text_is_the_librarys(live, models, adapters_folder):
    model = models["dec"]
    model.load_adapter("writer", adapters_folder / "writer")
    ids = prompt = [1, 5, 6, 7]
    for _ in range(6):
        # Only the prompt votes, also when its continuation is run with it.
        logits = model([ids], ["writer"], prompt_lengths=[len(prompt)]).logits[0]
        ids = [*ids, int(logits[-1].argmax())]
    text = text_of(live.complete(model="writer", prompt=PROMPT, temperature=0, max_tokens=6))
    assert text == "".join(f" w{token - 4}" for token in ids[4:])


@pytest.mark.parametrize("model", ["writer", "poet", "dec"])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 5, "top_p": 0.9}, {"seed": 6, "top_k": 3}])
def test_a_stream_says_what_a_whole_answer_says(live, model, how):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "logprobs": 1, "return_routes": True}
    whole = live.complete(**body, **how).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in events(live.complete(**body, **how, stream=True))]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [chunk["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    assert chunks[-1]["routes"] == whole["routes"]
    for key, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][key]] == values


def test_a_seed_reproduces_and_another_differs(live):
    body = {"model": "writer", "prompt": PROMPT, "max_tokens": 20, "temperature": 2}
    first = text_of(live.complete(**body, seed=1))
    assert text_of(live.complete(**body, seed=1)) == first
    assert text_of(live.complete(**body, seed=2)) != first


def test_several_prompts_make_several_choices(live):
    prompts = ["w1", "w2 w3", "w4 w5 w6"]
    answer = live.complete(model="writer", prompt=prompts, **GREEDY).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        assert choice["text"] == text_of(live.complete(model="writer", prompt=prompt, **GREEDY))
    streamed = ["", "", ""]
    for chunk in events(live.complete(model="writer", prompt=prompts, stream=True, **GREEDY)):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == [choice["text"] for choice in answer["choices"]]


def test_token_ids_are_prompts_too(live):
    expected = text_of(live.complete(model="writer", prompt=PROMPT, **GREEDY))
    assert text_of(live.complete(model="writer", prompt=[1, 5, 6, 7], **GREEDY)) == expected
    assert text_of(live.complete(model="writer", prompt=[[1, 5, 6, 7]], **GREEDY)) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_text_stops_before_a_stop_string(live, stream):
    full = text_of(live.complete(model="writer", prompt=PROMPT, **GREEDY))
    words = full.split()
    # Begins in one token and ends in the next.
    stop = f"{words[4][-1]} {words[5]}"
    body = {"model": "writer", "prompt": PROMPT, "stop": [stop, "never"], **GREEDY}
    response = live.complete(**body, stream=stream)
    choices = [event["choices"][0] for event in (events(response) if stream else [response.json()])]
    assert "".join(choice["text"] for choice in choices) == full[: full.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"


def test_generation_ends_at_the_end_of_sequence_token(live, monkeypatch):
    full = text_of(live.complete(model="writer", prompt=PROMPT, **GREEDY)).split()
    stop_id = int(full[3][1:]) + 4
    monkeypatch.setattr(live.engine.bases["dec"].tokenization, "stop_ids", frozenset([stop_id]))
    answer = live.complete(model="writer", prompt=PROMPT, **GREEDY).json()
    first = full.index(full[3])
    assert answer["choices"][0]["text"].split() == full[:first]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == first + 1
    ignoring = live.complete(model="writer", prompt=PROMPT, ignore_eos=True, **GREEDY).json()
    assert ignoring["choices"][0]["text"].split() == full


def test_log_probabilities_in_openais_shape(live):
    answer = live.complete(model="writer", prompt=PROMPT, logprobs=2, **GREEDY).json()["choices"][0]
    logprobs = answer["logprobs"]
    assert "".join(f" {token}" for token in logprobs["tokens"]) == answer["text"]
    for place, token in enumerate(logprobs["tokens"]):
        best = max(logprobs["top_logprobs"][place].items(), key=lambda item: item[1])
        assert best == (token, logprobs["token_logprobs"][place])
        assert len(logprobs["top_logprobs"][place]) == 2
        assert answer["text"][logprobs["text_offset"][place] :].startswith(f" {token}")


def test_the_answer_names_the_digest_and_the_usage(live):
    response = live.complete(model="writer", prompt=PROMPT, return_routes=True, **GREEDY)
    answer = response.json()
    assert answer["object"] == "text_completion"
    assert answer["usage"] == USAGE
    assert answer["adapter_digest"] == response.headers["x-adapter-digest"]
    assert len(answer["choices"][0]["routes"]) == 3
    bare = live.complete(model="dec", prompt=PROMPT, **GREEDY)
    assert bare.json()["adapter_digest"] is None
    assert "x-adapter-digest" not in bare.headers


def test_a_stream_reports_usage_on_demand(live):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(live.complete(model="writer", prompt=PROMPT, **options, **GREEDY))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == USAGE
    assert {chunk["usage"] for chunk in map(_hashable, chunks[:-1])} == {None}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["adapter_digest"].startswith("sha256:") for chunk in chunks)


def _hashable(chunk: dict) -> dict:
    return {"usage": chunk["usage"]}


def test_the_default_is_16_tokens(live):
    answer = live.complete(model="dec", prompt=PROMPT, temperature=0, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_openais_client_works(client):
    whole = client.completions.create(model="writer", prompt=PROMPT, temperature=0, max_tokens=8, n=1)
    stream = client.completions.create(
        model="writer", prompt=PROMPT, temperature=0, max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.completions.create(model="writer", prompt=PROMPT, n=2)
    assert unsupported.value.param == "n"


def test_neutral_values_that_clients_send_are_accepted(live):
    neutral = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "suffix": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "someone",
        "stop": None,
        "temperature": None,
        "top_p": None,
    }
    answer = live.complete(model="dec", prompt=PROMPT, max_tokens=2, **neutral)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"model": "mood"}, "model", "/v1/classify"),
        ({"model": "enc"}, "model", "encoder"),
        ({"n": 2}, "n", "1"),
        ({"n": True}, "n", "integer"),
        ({"best_of": 2}, "best_of", "1"),
        ({"echo": True}, "echo", "False"),
        ({"suffix": "x"}, "suffix", ""),
        ({"presence_penalty": 0.5}, "presence_penalty", "0"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "at most 0"),
        ({"min_p": 0.1}, "min_p", "unsupported parameter"),
        ({"temperature": 2.1}, "temperature", "2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -1}, "top_k", "0"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": 10**9}, "max_tokens", "1048576"),
        ({"seed": 2**64}, "seed", ""),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": ""}, "stop", "1"),
        ({"prompt": ""}, "prompt", ""),
        ({"prompt": []}, "prompt", "1"),
        ({"prompt": ["w1", 5]}, "prompt", ""),
        ({"prompt": [500]}, "prompt", "token id outside 0…96"),
        ({"prompt": ["w1"] * 33}, "prompt", "limit is 32"),
        ({"max_tokens": 93}, "prompt", "4 tokens and asks for 93 more; the limit is 96"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unsupported parameter"),
    ],
)
def test_bad_bodies_are_refused_by_field(live, changes, param, words):
    response = live.complete(**({"model": "writer", "prompt": PROMPT} | changes))
    if changes == {"prompt": ""}:
        # The tokenizer begins every text with <bos>, so no text is empty.
        assert response.status_code == 200
        return
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"] == param
    assert words in error["message"]


def test_the_whole_context_can_be_used(live):
    answer = live.complete(model="writer", prompt=PROMPT, max_tokens=92, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 96
