from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest

CONVERSATION = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


def test_classify_answers_in_vllms_published_shape(live):
    texts = ["w1 w2", "w3"]
    ours = live.classify(model="mood", input=texts).json()
    response = live.post("/classify", {"model": "mood", "input": texts})
    answer = response.json()
    assert answer.pop("id") == f"classify-{response.headers['x-request-id']}"
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "list",
        "model": "mood",
        "data": ours["data"],
        "usage": {
            "prompt_tokens": 5,
            "total_tokens": 5,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }
    assert response.headers["x-adapter-digest"] == ours["adapter_digest"]


def test_classify_gives_logits_on_demand(live):
    probs, logits = (
        live.post("/classify", {"model": "topic", "input": "w1", "use_activation": activation}).json()
        for activation in (None, False)
    )
    raw = live.post("/tei/topic/predict", {"inputs": "w1", "raw_scores": True}).json()
    assert sorted(logits["data"][0]["probs"], reverse=True) == [entry["score"] for entry in raw]
    assert sum(probs["data"][0]["probs"]) == pytest.approx(1)


def test_classify_cuts_long_texts_on_demand(live):
    body = {"model": "mood", "input": "w1 " * 200}
    assert live.post("/classify", body).status_code == 400
    answer = live.post("/classify", body | {"truncate_prompt_tokens": -1}).json()
    assert answer["usage"]["prompt_tokens"] == live.http.get("/v1/models/enc").json()["max_model_len"]


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/classify", {"input": "w1"}, "model"),
        ("/classify", {"model": "dec", "input": "w1"}, "model"),
        ("/classify", {"model": "mood", "input": []}, "input"),
        ("/classify", {"model": "mood", "input": [[1, 2]]}, "input"),
        ("/classify", {"model": "mood", "messages": CONVERSATION}, "input"),
        (
            "/classify",
            {"model": "mood", "input": "w1", "truncate_prompt_tokens": 5},
            "truncate_prompt_tokens",
        ),
        ("/classify", {"model": "mood", "input": "w1", "priority": 2**31}, "priority"),
        ("/tokenize", {"prompt": "w1"}, "model"),
        ("/tokenize", {"model": "dec"}, "prompt"),
        ("/tokenize", [], None),
        ("/tokenize", 3, None),
        ("/tokenize", "messages", None),
        ("/tokenize", {"model": "dec", "messages": []}, "messages"),
        ("/tokenize", {"model": "dec", "messages": CONVERSATION, "tools": []}, "tools"),
        ("/detokenize", {"model": "dec", "tokens": [97]}, "tokens"),
        ("/detokenize", {"model": "dec", "tokens": [-1]}, "tokens"),
    ],
    ids=str,
)
def test_bad_bodies_are_refused_by_field(live, route, body, param):
    response = live.post(route, body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("route", "body"),
    [("/classify", {"input": "w1"}), ("/tokenize", {"prompt": "w1"}), ("/detokenize", {"tokens": [1]})],
)
def test_where_several_models_fit_the_answer_says_how_to_name_one_here(live, route, body):
    response = live.post(route, body)
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert message.endswith("models fit: name one in the field model")


def test_tokens_of_a_text_and_back(live):
    answer = live.post("/tokenize", {"model": "writer", "prompt": "w1 w2", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 96,
        "tokens": [1, 5, 6],
        "token_strs": ["<bos>", "w1", "w2"],
    }
    plain = live.post("/tokenize", {"model": "dec", "prompt": "w1 w2", "add_special_tokens": False}).json()
    assert (plain["tokens"], plain["token_strs"]) == ([5, 6], None)
    assert live.post("/detokenize", {"model": "dec", "tokens": [1, 5, 6]}).json() == {"prompt": "<bos> w1 w2"}


def test_tokens_of_a_text_longer_than_the_model_takes(live):
    assert live.post("/tokenize", {"model": "dec", "prompt": "w1 " * 200}).json()["count"] == 201


def test_tokens_of_a_conversation(live, monkeypatch):
    tokenizer = live.engine.bases["dec"].tokenization._tokenizer
    template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    template += "{% if add_generation_prompt %}<bos>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)

    def tokens(**options):
        return live.post("/tokenize", {"model": "dec", "messages": CONVERSATION} | options).json()["tokens"]

    assert tokens() == [5, 6, 2, 7, 2, 1]
    assert tokens(add_generation_prompt=False) == [5, 6, 2, 7, 2]
    # The last message stays open, for the model to go on with.
    assert tokens(continue_final_message=True) == [5, 6, 2, 7]
    both = {"messages": CONVERSATION, "continue_final_message": True, "add_generation_prompt": True}
    assert live.chat(model="dec", **both).status_code == 400
    chat = live.chat(model="dec", messages=CONVERSATION, continue_final_message=True, max_tokens=1)
    assert chat.json()["usage"]["prompt_tokens"] == 4


def test_the_version(live):
    assert live.http.get("/version").json() == {"version": version("molex-serve")}


def test_the_gauge_names_the_adapters_in_use(live, brake):
    def labels() -> tuple[str, str]:
        pattern = (
            r'vllm:lora_requests_info{max_lora="1024",running_lora_adapters="(.*)",'
            r'waiting_lora_adapters="(.*)"}'
        )
        [found] = [re.fullmatch(pattern, name) for name in live.metrics() if name.startswith("vllm:")]
        return found[1], found[2]

    assert labels() == ("", "")
    held = brake(live, "dec")
    body = {"prompt": ["w1"] * 3, "max_tokens": 2}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(live.complete, model="writer", **body)
        held.until(lambda: labels()[0] == "writer")
        others = [pool.submit(live.complete, model=model, **body) for model in ("poet", "dec")]
        held.until(lambda: live.metrics()['molex_queue_depth{base="dec"}'] == 6)
        assert labels() == ("writer", "poet")
        held.release()
        assert {future.result().status_code for future in [first, *others]} == {200}
    held.until(lambda: labels() == ("", ""))
