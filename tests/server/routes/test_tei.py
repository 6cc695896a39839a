from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from huggingface_hub import InferenceClient

from tests.server.looks import waiting

PAIR = ["w1 w2", "w3"]
LONG = "w1 " * 200


def predict(live, inputs, model="mood", **body):
    return live.post(f"/tei/{model}/predict", {"inputs": inputs} | body)


def ranked(classification, labels):
    """What /v1/classify says, as TEI spells it."""
    pairs = zip(classification["probs"], labels, strict=True)
    return [{"score": score, "label": label} for score, label in sorted(pairs, reverse=True)]


@pytest.fixture(scope="module")
def labels(live):
    card = live.http.get("/v1/adapters/mood").json()
    return [card["labels"][str(number)] for number in range(len(card["labels"]))]


def test_one_text_one_pair_and_a_batch_are_what_classify_says(live, labels):
    expected = live.classify(model="mood", input=["w1 w2 w3", PAIR]).json()["data"]
    text, pair = (ranked(entry, labels) for entry in expected)
    for inputs, answer in [
        ("w1 w2 w3", text),
        (["w1 w2 w3"], text),
        (PAIR, pair),
        ([["w1 w2 w3"], PAIR], [text, pair]),
        ([["w1 w2 w3"]], [text]),
    ]:
        given = predict(live, inputs).json()
        flat = given if isinstance(given[0], dict) else [entry for part in given for entry in part]
        wanted = answer if isinstance(answer[0], dict) else [entry for part in answer for entry in part]
        assert isinstance(given[0], list) == isinstance(answer[0], list)
        assert [entry["label"] for entry in flat] == [entry["label"] for entry in wanted]
        # Other batch-mates, other rounding.
        np.testing.assert_allclose([e["score"] for e in flat], [e["score"] for e in wanted], atol=1e-5)


def test_raw_scores_are_the_logits(live):
    raw = predict(live, "w1 w2 w3", raw_scores=True).json()
    probs = predict(live, "w1 w2 w3").json()
    scores = np.exp([entry["score"] for entry in raw])
    np.testing.assert_allclose(scores / scores.sum(), [entry["score"] for entry in probs], atol=1e-5)


def test_headers_say_times_and_sizes(live):
    headers = predict(live, [["w1 w2 w3"], PAIR]).headers
    for name in ("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time", "x-compute-time"):
        assert re.fullmatch("[0-9]+", headers[name])
    assert int(headers["x-compute-characters"]) == len("w1 w2 w3") + len("".join(PAIR))
    assert int(headers["x-compute-tokens"]) > 6
    assert headers["x-adapter-digest"].startswith("sha256:")


@pytest.mark.parametrize(("device", "compute_type"), [("cpu", "cpu"), ("cuda", "gpu"), ("cuda:1", "gpu")])
def test_headers_say_what_computes(live, monkeypatch, device, compute_type):
    # The bases have been loaded, so that it takes no GPU to say this.
    monkeypatch.setattr(live.engine, "settings", live.engine.settings.model_copy(update={"device": device}))
    for path in ("/tei/mood/predict", "/tei/enc/embed"):
        assert live.post(path, {"inputs": "w1"}).headers["x-compute-type"] == compute_type


def test_embeddings_are_those_of_the_openai_route(live):
    texts = ["w1 w2 w3", "w9"]
    expected = [entry["embedding"] for entry in live.embed(model="enc", input=texts).json()["data"]]
    given = live.post("/tei/enc/embed", {"inputs": texts}).json()
    np.testing.assert_allclose(given, expected, atol=1e-5)
    [raw] = live.post("/tei/enc/embed", {"inputs": "w9", "normalize": False}).json()
    np.testing.assert_allclose(np.array(raw) / np.linalg.norm(raw), expected[1], atol=1e-5)


@pytest.mark.parametrize("inputs", [LONG, [LONG, "w1"]], ids=["text", "pair"])
def test_a_long_text_is_refused_or_cut_as_asked(live, inputs):
    refused = predict(live, inputs)
    assert refused.status_code == 413
    assert refused.json()["error_type"] == "Validation"
    assert "the limit is" in refused.json()["error"]
    limit = live.http.get("/tei/mood/info").json()["max_input_length"]
    cut = predict(live, inputs, truncate=True)
    assert cut.status_code == 200
    assert int(cut.headers["x-compute-tokens"]) == limit


def test_cutting_one_text_leaves_others_whole(live):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: predict(live, LONG, truncate=n % 2 == 0).status_code, range(24)))
    assert answers == [200, 413] * 12


def test_a_batch_that_is_too_large_is_refused_as_by_tei(live):
    refused = predict(live, [["w1"]] * 33)
    assert refused.status_code == 413
    assert refused.json() == {"error": "inputs: 33 entries; the limit is 32", "error_type": "Validation"}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "inputs"),
        ({"inputs": ["w1", "w2", "w3"]}, "inputs"),
        ({"inputs": ["w1", ["w2"]]}, "inputs"),
        ({"inputs": "w1", "truncation_direction": "Left"}, "truncation_direction"),
        ({"inputs": "w1", "top_k": 3}, "unsupported parameter: top_k"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_by_name(live, body, problem):
    answer = live.post("/tei/mood/predict", body)
    assert answer.status_code == 422
    assert problem in answer.json()["error"]
    assert answer.json()["error_type"] == "Validation"


def test_names_that_do_not_fit(live):
    assert predict(live, "w1", model="nobody").status_code == 404
    for refused, words in [
        (predict(live, "w1", model="enc"), "no classes"),
        (live.post("/tei/mood/embed", {"inputs": "w1"}), "bare encoder"),
        (live.http.get("/tei/dec/info"), "bare encoder"),
    ]:
        # TEI has 424 for a model of another task; here that is left to faults of the server.
        assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
        assert words in refused.json()["error"]


@pytest.mark.parametrize("inputs", ["", [], [""], ["", ""], [[]], [["w1"], []], [["w1"], [""]]], ids=str)
def test_nothing_to_classify_is_empty(live, inputs):
    refused = predict(live, inputs)
    assert refused.status_code == 400
    assert refused.json() == {"error": "inputs: cannot be empty", "error_type": "Empty"}


def test_half_of_a_pair_may_be_empty(live):
    assert predict(live, ["w1", ""]).status_code == 200


@pytest.mark.parametrize("inputs", ["", [], ["w1", ""]], ids=str)
def test_nothing_to_embed_is_empty(live, inputs):
    refused = live.post("/tei/enc/embed", {"inputs": inputs})
    assert refused.status_code == 400
    assert refused.json() == {"error": "inputs: cannot be empty", "error_type": "Empty"}


def test_a_pass_that_fails_is_a_failed_backend(live, threads, brake):
    held = brake(live, "enc")
    asked = threads.submit(predict, live, "w1")
    held.until(lambda: len(held.batches) == 1)
    held.failing = True
    held.release()
    failed = asked.result()
    assert failed.status_code == 424
    assert failed.json()["error_type"] == "Backend"
    assert "internal error" in failed.json()["error"]


def test_a_full_queue_is_overloaded(live, threads, brake):
    held = brake(live, "enc")
    first = threads.submit(predict, live, "w1")
    held.until(lambda: len(held.batches) == 1)
    full = [threads.submit(predict, live, [["w1"]] * 32) for _ in range(2)]
    held.until(lambda: waiting(live, "enc") == 64)
    refused = predict(live, "w1")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error_type"] == "Overloaded"
    held.release()
    assert {future.result().status_code for future in (first, *full)} == {200}


def test_what_is_not_done_in_time_is_a_failed_backend(live, brake):
    brake(live, "enc")
    late = live.http.post("/tei/mood/predict", json={"inputs": "w1"}, headers={"x-request-timeout": "0.05"})
    assert (late.status_code, late.json()["error_type"]) == (504, "Backend")


def test_info_of_an_adapter_and_of_an_encoder(live, labels):
    adapter = live.http.get("/tei/mood/info").json()
    # The published fields, in their order.
    assert list(adapter) == [
        "model_id",
        "model_sha",
        "model_dtype",
        "model_type",
        "max_concurrent_requests",
        "max_input_length",
        "max_batch_tokens",
        "max_batch_requests",
        "max_client_batch_size",
        "auto_truncate",
        "tokenization_workers",
        "version",
        "sha",
        "docker_label",
    ]
    assert adapter["model_id"] == "mood"
    assert adapter["model_sha"] == live.http.get("/v1/adapters/mood").json()["digest"]
    ids = adapter["model_type"]["classifier"]
    assert ids["id2label"] == {str(number): label for number, label in enumerate(labels)}
    assert ids["label2id"] == {label: number for number, label in enumerate(labels)}
    assert live.http.get("/tei/enc/info").json()["model_type"] == {"embedding": {"pooling": "mean"}}


def test_at_the_root_the_name_is_needed_only_where_several_fit(live):
    assert live.post("/embed", {"inputs": "w1"}).status_code == 200
    asked = live.post("/predict", {"inputs": "w1"})
    assert asked.status_code == 404
    assert asked.json()["error"].endswith("models fit: name one with ?model=NAME or /tei/NAME")
    assert live.post("/predict?model=mood", {"inputs": "w1"}).status_code == 200


def test_health(live):
    for path in ("/health", "/tei/mood/health"):
        answer = live.http.get(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_server_that_drains_is_unhealthy(start, settings):
    live = start(settings)
    live.engine.draining = True
    answer = live.http.get("/tei/mood/health")
    assert answer.status_code == 503
    assert answer.json()["error_type"] == "Unhealthy"


def test_hugging_faces_own_client(live, monkeypatch):
    # It takes this server for the model hub, which tests never ask.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client = InferenceClient(timeout=60)
    expected = live.post("/tei/enc/embed", {"inputs": "w1 w2"}).json()
    vectors = client.feature_extraction(
        "w1 w2", model=f"{live.url}/tei/enc/embed", normalize=True, truncate=True
    )
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
