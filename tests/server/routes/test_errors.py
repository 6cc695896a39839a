"""Failures that no endpoint of its own answers."""

from __future__ import annotations

import json

import pytest

JSON = {"content-type": "application/json"}


def error_of(response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_an_unknown_path_is_404(live):
    response = live.http.get("/v2/nothing")
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


def test_a_wrong_method_is_405(live):
    response = live.http.get("/v1/classify")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'"text"', b"\xff", b"null", b"{'a': 1}"])
def test_a_body_that_is_no_json_object_is_400(live, content):
    response = live.http.post("/v1/classify", content=content, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_body_that_is_not_said_to_be_json_is_400(live):
    content = b'{"model": "mood", "input": "w1"}'
    response = live.http.post("/v1/classify", content=content, headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "content-type is not application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/v1/models?limit=3", "limit"),
        ("GET", "/v1/adapters/mood?wait=3", "wait"),
        ("PUT", "/v1/adapters/mood?wait=3&wiat=3", "wiat"),
        ("POST", "/v1/classify?model=mood", "model"),
        ("GET", "/metrics?x", "x"),
        ("POST", "/v1/load_lora_adapter?x=", "x"),
    ],
)
def test_a_query_parameter_that_a_route_does_not_have_is_400(live, method, path, name):
    bodies = {"PUT": {"source": "mood"}, "POST": {"model": "mood", "input": "w1"}}
    response = live.http.request(method, path, json=bodies.get(method))
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["message"]) == (name, f"unsupported parameter: {name}")


def test_a_number_that_is_none_is_400(live):
    content = b'{"model": "dec", "prompt": "w1", "temperature": NaN}'
    response = live.http.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["param"] == "temperature"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413(live, chunked):
    content = json.dumps({"model": "mood", "input": "w1 " * 2_000_000}).encode()
    body = iter([content]) if chunked else content
    response = live.http.post("/v1/classify", content=body, headers=JSON)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_deeply_nested_json_is_400(live):
    content = b"[" * 100_000
    response = live.http.post("/v1/classify", content=content, headers=JSON)
    assert response.status_code == 400


def test_a_fault_of_ours_is_a_plain_500(live, monkeypatch):
    def broken(*_):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(live.engine.adapters, "all", broken)
    response = live.http.get("/v1/models")
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert "x-request-id" in response.headers


def test_an_offending_value_is_not_repeated(live):
    response = live.classify(model="mood", input={"password": "hunter2"})
    assert response.status_code == 400
    assert "hunter2" not in response.text
