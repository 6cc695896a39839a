from __future__ import annotations

import pytest
import torch

TEXTS = ["w1 w2 w3", "w9", "w8 w7 w6 w5 w4"]


@pytest.fixture(scope="module")
def expected(models, adapters_folder):
    """Probabilities and routes straight from the library."""

    def run(name: str, text: str) -> tuple[list[float], list]:
        model = models["enc"]
        model.load_adapter(name, adapters_folder / name)
        ids = [1, *(int(word[1:]) + 4 - 0 for word in text.split())]
        output = model([ids], [name])
        return output.logits[0].softmax(-1).tolist(), output.routes[0]

    return run


@pytest.mark.parametrize("name", ["mood", "topic", "rank2"])
def test_answers_are_the_models(live, expected, name):
    answer = live.classify(model=name, input=TEXTS, return_routes=True).json()
    for text, entry in zip(TEXTS, answer["data"], strict=True):
        probs, routes = expected(name, text)
        # The library runs in float32 here, the server in float64.
        assert entry["probs"] == pytest.approx(probs, abs=1e-4)
        assert entry["routes"] == [list(r) if isinstance(r, tuple) else r for r in routes]
        assert entry["label"] in ("bad", "fair", "good", "LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
        assert entry["num_classes"] == len(probs)


def test_the_answer_has_vllms_shape_and_the_digest(live):
    response = live.classify(model="mood", input="w1 w2")
    answer = response.json()
    assert set(answer) == {"id", "object", "created", "model", "data", "usage", "adapter_digest"}
    assert (answer["object"], answer["model"]) == ("list", "mood")
    assert set(answer["data"][0]) == {"index", "label", "probs", "num_classes"}
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    digest = live.http.get("/v1/adapters/mood").json()["digest"]
    assert answer["adapter_digest"] == response.headers["x-adapter-digest"] == digest


def test_the_label_is_the_most_likely_one(live):
    [entry] = live.classify(model="mood", input="w1 w2").json()["data"]
    best = torch.tensor(entry["probs"]).argmax()
    assert entry["label"] == ["bad", "fair", "good"][best]
    assert sum(entry["probs"]) == pytest.approx(1)


def test_a_list_keeps_its_order_and_equals_single_requests(live):
    answer = live.classify(model="topic", input=TEXTS).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    for text, entry in zip(TEXTS, answer["data"], strict=True):
        [alone] = live.classify(model="topic", input=text).json()["data"]
        assert entry["probs"] == pytest.approx(alone["probs"], abs=1e-6)


def test_a_pair_of_texts_is_one_input(live):
    answer = live.classify(model="mood", input=[["w1 w2", "w3"], "w1"]).json()
    assert len(answer["data"]) == 2
    # <bos> w1 w2 <eos> w3, and <bos> w1
    assert answer["usage"]["prompt_tokens"] == 5 + 2


def test_a_decoder_classifies_too(live):
    answer = live.classify(model="judge", input="w1 w2", return_routes=True)
    assert answer.status_code == 200
    assert len(answer.json()["data"][0]["routes"]) == 3


def test_a_lora_adapter_has_no_routes(live):
    [entry] = live.classify(model="topic", input="w1", return_routes=True).json()["data"]
    assert entry["routes"] == []


def test_timings_come_in_headers(live):
    headers = live.classify(model="mood", input="w1").headers
    parts = [float(headers[f"x-{stage}-time"]) for stage in ("tokenization", "queue", "inference")]
    assert min(parts) >= 0
    assert sum(parts) <= float(headers["x-total-time"])


@pytest.mark.parametrize(
    ("model", "status", "code", "words"),
    [
        ("nobody", 404, "model_not_found", "nobody"),
        ("enc", 400, "wrong_task", "bare base"),
        ("dec", 400, "wrong_task", "bare base"),
        ("writer", 400, "wrong_task", "adapter for generation"),
    ],
)
def test_models_that_cannot_classify_are_refused(live, model, status, code, words):
    response = live.classify(model=model, input="w1")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, "model")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": "w1"}, "model", "required"),
        ({"model": "mood"}, "input", "required"),
        ({"model": "mood", "input": []}, "input", "at least 1"),
        ({"model": "mood", "input": 3}, "input", "string"),
        ({"model": "mood", "input": ["w1"] * 33}, "input", "the limit is 32"),
        ({"model": "mood", "input": [["a", "b", "c"]]}, "input", "at most 2"),
        ({"model": "mood", "input": "\ud800"}, "input", "unicode"),
        ({"model": "mood", "input": ["w1", " ".join(["w1"] * 200)]}, "input.1", "201 tokens"),
        ({"model": "mood", "input": "w1", "truncate": True}, "truncate", "unsupported parameter"),
        ({"model": "mood", "input": "w1", "return_routes": "yes"}, "return_routes", "boolean"),
    ],
)
def test_bad_bodies_are_refused_by_field(live, body, param, words):
    response = live.classify(**body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
