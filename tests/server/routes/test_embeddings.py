from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

TEXTS = ["w1 w2 w3", "w9", "w8 w7 w6 w5 w4"]


@pytest.fixture(scope="module")
def expected(bases):
    """Mean pooling over the model as transformers runs it, one text at a time."""
    model = AutoModel.from_pretrained(bases["enc"], add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(bases["enc"])

    def run(text: str) -> list[float]:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return normalize(hidden[0].mean(0), dim=0).tolist()

    return run


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_vectors_are_the_models(live, expected):
    answer = live.embed(model="enc", input=TEXTS).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    for text, entry in zip(TEXTS, answer["data"], strict=True):
        # The server runs in float64 here, transformers in float32.
        assert entry["embedding"] == pytest.approx(expected(text), abs=1e-5)


@hypothesis_settings(max_examples=20)
@given(text=st.lists(st.integers(0, 92).map("w{}".format), max_size=90).map(" ".join))
def test_any_text_has_a_vector_of_length_one(live, expected, text):
    [entry] = live.embed(model="enc", input=text).json()["data"]
    assert entry["embedding"] == pytest.approx(expected(text), abs=1e-5)
    assert np.linalg.norm(entry["embedding"]) == pytest.approx(1, abs=1e-6)


def test_the_answer_has_openais_shape(live):
    response = live.embed(model="enc", input="w1 w2", user="someone", dimensions=None)
    answer = response.json()
    assert set(answer) == {"object", "data", "model", "usage"}
    assert (answer["object"], answer["model"]) == ("list", "enc")
    assert set(answer["data"][0]) == {"object", "index", "embedding"}
    assert answer["data"][0]["object"] == "embedding"
    # <bos> w1 w2
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert "x-adapter-digest" not in response.headers


def test_base64_is_little_endian_float32(live):
    [numbers] = live.embed(model="enc", input="w1", encoding_format="float").json()["data"]
    [encoded] = live.embed(model="enc", input="w1", encoding_format="base64").json()["data"]
    decoded = np.frombuffer(base64.b64decode(encoded["embedding"], validate=True), "<f4")
    assert decoded.tolist() == numbers["embedding"]


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openais_client_reads_it(client, expected, options):
    """Unless told otherwise, it asks for base64 and hands out numbers."""
    answer = client.embeddings.create(model="enc", input=TEXTS, **options)
    assert answer.usage.total_tokens == 4 + 2 + 6
    for text, entry in zip(TEXTS, answer.data, strict=True):
        vector = entry.embedding
        if isinstance(vector, str):
            vector = np.frombuffer(base64.b64decode(vector), "<f4").tolist()
        assert vector == pytest.approx(expected(text), abs=1e-5)


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.embeddings.create(model="nobody", input="w1")
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="enc", input="w1", dimensions=8)


def test_embeddings_and_classifications_share_a_batch(live, brake):
    requests = [
        lambda: live.embed(model="enc", input=TEXTS[0]),
        lambda: live.classify(model="mood", input=TEXTS[1]),
        lambda: live.embed(model="enc", input=TEXTS[2]),
        lambda: live.classify(model="topic", input=TEXTS[0]),
    ]
    alone = [request().json()["data"][0] for request in requests]
    held = brake(live, "enc")
    with ThreadPoolExecutor(len(requests) + 1) as threads:
        threads.submit(live.embed, model="enc", input="w1")
        held.until(lambda: len(held.batches) == 1)
        together = [threads.submit(request) for request in requests]
        held.until(lambda: live.metrics()['molex_queue_depth{base="enc"}'] == len(requests))
        held.release()
    assert [len(batch) for batch in held.batches] == [1, len(requests)]
    for one, other in zip(alone, together, strict=True):
        [entry] = other.result().json()["data"]
        key = "probs" if "probs" in one else "embedding"
        assert entry[key] == pytest.approx(one[key], abs=1e-6)


def test_a_vector_that_is_not_finite_is_a_plain_500(live, monkeypatch):
    backbone = live.engine.bases["enc"].model.backbone
    embed = backbone.embed
    monkeypatch.setattr(backbone, "embed", lambda *inputs: embed(*inputs) * torch.nan)
    response = live.embed(model="enc", input="w1")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


def test_timings_come_in_headers(live):
    headers = live.embed(model="enc", input="w1").headers
    parts = [float(headers[f"x-{stage}-time"]) for stage in ("tokenization", "queue", "inference")]
    assert min(parts) >= 0
    assert sum(parts) <= float(headers["x-total-time"])


@pytest.mark.parametrize(
    ("model", "status", "code", "words"),
    [
        ("nobody", 404, "model_not_found", "nobody"),
        ("mood", 400, "wrong_task", "'mood' is an adapter"),
        ("topic", 400, "wrong_task", "'topic' is an adapter"),
        ("writer", 400, "wrong_task", "'writer' is an adapter"),
        ("dec", 400, "wrong_task", "'dec' is a base for generation"),
    ],
)
def test_models_that_do_not_embed_are_refused(live, model, status, code, words):
    response = live.embed(model=model, input="w1")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, "model")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": "w1"}, "model", "required"),
        ({"model": "enc"}, "input", "required"),
        ({"model": "enc", "input": []}, "input", "at least 1"),
        ({"model": "enc", "input": [5, 6]}, "input", "input.0: Input should be a valid string"),
        ({"model": "enc", "input": [[5, 6]]}, "input", "input.0: Input should be a valid string"),
        ({"model": "enc", "input": [["w1", "w2"]]}, "input", "input.0: Input should be a valid string"),
        ({"model": "enc", "input": ["w1"] * 33}, "input", "the limit is 32"),
        ({"model": "enc", "input": "\ud800"}, "input", "unicode"),
        ({"model": "enc", "input": ["w1", " ".join(["w1"] * 200)]}, "input.1", "201 tokens"),
        ({"model": "enc", "input": "w1", "dimensions": 8}, "dimensions", "dimensions"),
        ({"model": "enc", "input": "w1", "encoding_format": "int8"}, "encoding_format", "'base64'"),
        ({"model": "enc", "input": "w1", "truncate": True}, "truncate", "unsupported parameter"),
    ],
)
def test_bad_bodies_are_refused_by_field(live, body, param, words):
    response = live.embed(**body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
