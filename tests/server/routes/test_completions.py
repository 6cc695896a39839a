from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

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
        client.completions.create(model="writer", prompt=PROMPT, best_of=2)
    assert unsupported.value.param == "best_of"


def test_choices_of_one_prompt_differ_in_their_random_numbers(client):
    arguments = {"model": "writer", "prompt": PROMPT, "max_tokens": 8, "temperature": 1.5, "seed": 3}
    answer = client.completions.create(**arguments, n=3, best_of=3)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    alone = [client.completions.create(**arguments | {"seed": 3 + k}) for k in range(3)]
    assert texts == [one.choices[0].text for one in alone]
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_prompt_are_neighbours(live, stream):
    body = {"model": "poet", "prompt": ["w1", "w2 w3"], "seed": 1, "max_tokens": 6, "echo": True}
    response = live.complete(**body, n=2, stream=stream)
    texts = ["", "", "", ""]
    for event in events(response) if stream else [response.json()]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    for k, text in enumerate(texts):
        alone = live.complete(**body | {"prompt": body["prompt"][k // 2], "seed": 1 + k % 2})
        assert text == text_of(alone)


def test_an_echo_is_the_prompt_as_text(live):
    continuation = text_of(live.complete(model="writer", prompt=PROMPT, **GREEDY))
    echoed = {"model": "writer", "echo": True, **GREEDY}
    assert text_of(live.complete(prompt=PROMPT, **echoed)) == PROMPT + continuation
    assert text_of(live.complete(prompt=[1, 5, 6, 7], **echoed)) == PROMPT + continuation


def test_a_bias_forces_and_forbids_tokens(client):
    arguments = {"model": "writer", "prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    forced = client.completions.create(**arguments, logit_bias={"30": 100})
    assert forced.choices[0].text == " w26" * 6
    first = client.completions.create(**arguments).choices[0].text.split()[0]
    forbidden = client.completions.create(**arguments, logit_bias={str(int(first[1:]) + 4): -100})
    assert first not in forbidden.choices[0].text.split()


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_keep_text_from_repeating(live, penalty):
    # The bias alone repeats one token; the penalties are worth more than the rest of the bias.
    body = {"model": "dec", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    body |= {"logit_bias": {str(token): 50.0 for token in range(30, 40)}}
    plain = text_of(live.complete(**body)).split()
    value = 10.0 if penalty == "repetition_penalty" else 2.0
    assert len(set(text_of(live.complete(**body | {penalty: value})).split())) > len(set(plain))


def test_min_p_1_leaves_the_best_token(live):
    body = {"model": "writer", "prompt": PROMPT, "max_tokens": 8}
    greedy = text_of(live.complete(**body, temperature=0))
    assert text_of(live.complete(**body, temperature=2, min_p=1)) == greedy


def test_log_probabilities_are_the_models_whatever_is_penalised(live):
    body = {"model": "writer", "prompt": PROMPT, "logprobs": 3, "temperature": 0, "max_tokens": 1}
    plain, biased = (live.complete(**body, **how).json() for how in ({}, {"logit_bias": {"30": 100}}))
    tops = [answer["choices"][0]["logprobs"]["top_logprobs"][0] for answer in (plain, biased)]
    assert tops[0] == tops[1]
    assert biased["choices"][0]["logprobs"]["token_logprobs"][0] < min(tops[0].values())


def test_openais_client_waits_as_long_as_a_full_queue_asks(live, client, brake, monkeypatch):
    held = brake(live, "dec")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        held.release()
        held.until(lambda: live.metrics()['molex_queue_depth{base="dec"}'] == 0)

    monkeypatch.setattr(openai._base_client, "time", SimpleNamespace(sleep=sleep, time=time.time))
    arguments = {"model": "dec", "prompt": ["w1"] * 32, "max_tokens": 1}
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(client.completions.create, **arguments) for _ in range(2)]
        held.until(lambda: live.metrics()['molex_queue_depth{base="dec"}'] >= 60)
        patient = client.with_options(max_retries=1)
        answer = patient.completions.create(model="dec", prompt=["w1"] * 5, max_tokens=1)
        assert [len(other.result().choices) for other in others] == [32, 32]
    assert len(answer.choices) == 5
    # Its own first pause would be 0.375 to 0.5 s.
    assert waited == [1.0]


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
        ({"n": 0}, "n", "1"),
        ({"n": 129}, "n", "128"),
        ({"n": True}, "n", "integer"),
        ({"n": 17, "prompt": ["w1", "w2"]}, "n", "34 choices; the limit is 32"),
        ({"best_of": 2}, "best_of", "only the value of n"),
        ({"best_of": 2, "n": 3}, "best_of", "only the value of n"),
        ({"echo": True, "logprobs": 0}, None, "echo is not supported together with logprobs"),
        ({"suffix": "x"}, "suffix", ""),
        ({"presence_penalty": 2.5}, "presence_penalty", "2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "-2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"repetition_penalty": 1e-110}, "repetition_penalty", "0.01"),
        ({"min_p": 1.5}, "min_p", "1"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "pattern"),
        ({"logit_bias": {"97": 1}}, "logit_bias", "token id outside 0…96"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "1024"),
        ({"use_beam_search": True}, "use_beam_search", "unsupported parameter"),
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
