"""The Open Inference Protocol, by Triton's client and by its published shapes."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

TEXTS = ["w1 w2", "w3", "w4 w5 w6"]


@pytest.fixture(scope="module")
def client(live):
    client = triton.InferenceServerClient(live.url.removeprefix("http://"))
    yield client
    client.close()


def text_input(texts, *, name="text", shape=None, binary=True):
    array = np.array(texts, dtype=object).reshape(shape or [len(texts)])
    tensor = triton.InferInput(name, list(array.shape), "BYTES")
    return tensor.set_data_from_numpy(array, binary_data=binary)


def infer(live, model="mood", **changes):
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}
    return live.post(f"/v2/models/{model}/infer", {"inputs": [tensor]} | changes)


def test_the_server_says_what_it_is(live, client):
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata["name"] == "molex-serve"
    assert "binary_tensor_data" in metadata["extensions"]


def test_a_model_says_what_it_takes_and_gives(live, client):
    digest = live.http.get("/v1/adapters/mood").json()["digest"].removeprefix("sha256:")
    metadata = client.get_model_metadata("mood")
    assert metadata["versions"] == [digest]
    assert [(t["name"], t["datatype"], t["shape"]) for t in metadata["inputs"] + metadata["outputs"]] == [
        ("text", "BYTES", [-1]),
        ("text_pair", "BYTES", [-1]),
        ("probabilities", "FP32", [-1, 3]),
        ("logits", "FP32", [-1, 3]),
        ("label", "BYTES", [-1]),
    ]
    assert client.get_model_metadata("mood", digest) == metadata
    assert client.get_model_metadata("enc")["outputs"] == [
        {"name": "embedding", "datatype": "FP32", "shape": [-1, 32]}
    ]


def test_what_can_be_asked_is_ready(client):
    assert client.is_model_ready("mood")
    assert client.is_model_ready("enc")
    assert not client.is_model_ready("mood", "0123")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("writer")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_tritons_client_gets_what_classify_says(live, client, binary_in, binary_out, shape):
    expected = live.classify(model="mood", input=TEXTS).json()["data"]
    outputs = None
    if binary_out is not None:
        names = ("probabilities", "label")
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    inputs = [text_input(TEXTS, shape=shape, binary=binary_in)]
    result = client.infer("mood", inputs, outputs=outputs, request_id="a/7")
    probabilities = result.as_numpy("probabilities")
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, [entry["probs"] for entry in expected], rtol=1e-6)
    labels = [label.decode() if binary_out is not False else label for label in result.as_numpy("label")]
    assert labels == [entry["label"] for entry in expected]
    assert result.get_response()["id"] == "a/7"
    assert (result.as_numpy("logits") is None) == (binary_out is not None)


def test_pairs_are_two_tensors(live, client):
    pairs = [["w1 w2", "w3"], ["w4", "w5"]]
    expected = live.classify(model="topic", input=pairs).json()["data"]
    first, second = ([pair[k] for pair in pairs] for k in (0, 1))
    result = client.infer("topic", [text_input(first), text_input(second, name="text_pair")])
    np.testing.assert_allclose(
        result.as_numpy("probabilities"), [entry["probs"] for entry in expected], rtol=1e-6
    )


def test_a_bare_encoder_embeds(live, client):
    expected = live.embed(model="enc", input=TEXTS).json()["data"]
    vectors = client.infer("enc", [text_input(TEXTS)]).as_numpy("embedding")
    np.testing.assert_allclose(vectors, [entry["embedding"] for entry in expected], rtol=1e-6)


def test_the_answer_is_in_the_published_shape(live):
    response = infer(live, id="x", outputs=[{"name": "label"}])
    card = live.http.get("/v1/adapters/mood").json()
    assert response.json() == {
        "model_name": "mood",
        "model_version": card["digest"].removeprefix("sha256:"),
        "id": "x",
        "outputs": [
            {
                "name": "label",
                "datatype": "BYTES",
                "shape": [1],
                "data": [live.classify(model="mood", input="w1").json()["data"][0]["label"]],
            }
        ],
    }
    assert response.headers["x-adapter-digest"] == card["digest"]
    assert float(response.headers["x-total-time"]) > 0


def test_data_may_be_nested_by_the_shape(live):
    tensor = {"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [["w1"], ["w2"]]}
    assert infer(live, inputs=[tensor]).json()["outputs"][0]["shape"] == [2, 3]


def test_adapters_are_loaded_and_unloaded(live, client):
    client.load_model("topic")
    live.post("/v2/repository/models/again/load", {"parameters": {"source": "mood", "base": "enc"}})
    index = {entry["name"]: entry for entry in client.get_model_repository_index()}
    assert set(index) == {"enc", "dec", "mood", "topic", "rank2", "writer", "poet", "judge", "again"}
    assert index["again"] == index["mood"] | {"name": "again"}
    assert {entry["state"] for entry in index.values()} == {"READY"}
    client.unload_model("again")
    assert not client.is_model_ready("again")


def test_an_error_is_tritons(client):
    with pytest.raises(InferenceServerException, match="no base or adapter is named 'nobody'"):
        client.infer("nobody", [text_input(["w1"])])
    with pytest.raises(InferenceServerException, match="there is no folder 'missing'"):
        client.load_model("missing")
    with pytest.raises(InferenceServerException, match=r"unsupported parameter: parameters\.config"):
        client.load_model("topic", config="{}")
    with pytest.raises(InferenceServerException, match="no adapter is named"):
        client.unload_model("missing")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_a_packed_body_is_refused_by_name(client, algorithm):
    with pytest.raises(InferenceServerException, match="content-encoding is not supported"):
        client.infer("mood", [text_input(["w1"])], request_compression_algorithm=algorithm)


def tensor(**changes):
    return {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [tensor(name="ids")]}, "inputs.0.name"),
        ({"inputs": [tensor(datatype="FP32")]}, "inputs.0.datatype"),
        ({"inputs": [tensor(shape=[2])]}, "1 texts do not fit the shape [2]"),
        ({"inputs": [tensor(shape=[1, 2], data=["w1", "w2"])]}, "do not fit the shape [1, 2]"),
        ({"inputs": [tensor(shape=[0], data=[])]}, "there is no text"),
        ({"inputs": [tensor(data=None)]}, "neither data nor binary_data_size"),
        ({"inputs": [tensor(), tensor()]}, "given twice"),
        ({"inputs": [tensor(name="text_pair")]}, "there is no text"),
        ({"inputs": [tensor(), tensor(name="text_pair", shape=[2], data=["a", "b"])]}, "make no pairs"),
        ({"inputs": [tensor(shape=[33], data=["w1"] * 33)]}, "the limit is 32"),
        ({"inputs": [tensor(parameters={"binary_data_size": 3})]}, "both data and binary_data_size"),
        ({"outputs": [{"name": "logit"}]}, "there is no 'logit', only probabilities, logits, label"),
        ({"outputs": [{"name": "label", "parameters": {"classification": 2}}]}, "classification"),
        ({"parameters": {"sequence_id": 3}}, "unsupported parameter: parameters.sequence_id"),
        ({"timeout": 3}, "unsupported parameter: timeout"),
    ],
    ids=str,
)
def test_bad_bodies_are_refused_by_name(live, changes, words):
    response = infer(live, **changes)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert words in response.json()["error"]


@pytest.mark.parametrize(
    ("binary", "length", "words"),
    [
        (b"", None, "do not hold whole texts"),
        (struct.pack("<I", 2) + b"w1!", None, "1 bytes belong to no input"),
        (struct.pack("<I", 9) + b"w1", None, "do not hold whole texts"),
        (struct.pack("<I", 2) + b"\xff\xfe", None, "not UTF-8"),
        (struct.pack("<I", 2) + b"w1", "100000", "not the number of bytes"),
        (struct.pack("<I", 2) + b"w1", "-3", "not the number of bytes"),
        (struct.pack("<I", 2) + b"w1", "9", "not valid JSON"),
    ],
)
def test_bad_bytes_are_refused(live, binary, length, words):
    data = tensor(parameters={"binary_data_size": 6})
    del data["data"]
    text = json.dumps({"inputs": [data]}).encode()
    headers = {"inference-header-content-length": length or str(len(text))}
    response = live.http.post("/v2/models/mood/infer", content=text + binary, headers=headers)
    assert response.status_code == 400
    assert words in response.json()["error"]


@pytest.mark.parametrize("body", [b"[]", b"3", b"\xff", b"[" * 100_000, b'{"ready": 1}', b'{"x": 1}'])
def test_a_body_that_is_none_is_refused(live, body):
    assert live.http.post("/v2/repository/index", content=body).status_code == 400


def test_models_for_generation_are_refused(live):
    assert infer(live, "writer").status_code == 400
    assert infer(live, "dec").status_code == 400
    assert live.http.get("/v2/models/writer").status_code == 400
