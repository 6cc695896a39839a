"""The answers are what the OpenAPI document says."""

from __future__ import annotations

import json

import pytest

from server.routes.answers import ChatCompletion, Completion, InferResponse

MESSAGES = [{"role": "user", "content": "w1 w2"}]
DETAILS = {"max_tokens": 4, "return_routes": True, "n": 2}


@pytest.mark.parametrize("model", ["writer", "dec"])
def test_completions(live, model):
    for how in ({}, {"logprobs": 2}):
        response = live.complete(model=model, prompt="w1", **DETAILS, **how)
        Completion.model_validate_json(response.content)


def test_streamed_completions(live):
    body = {"model": "writer", "prompt": "w1", "stream": True, "logprobs": 1, **DETAILS}
    response = live.complete(**body, stream_options={"include_usage": True})
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    for event in events:
        Completion.model_validate(json.loads(event.removeprefix("data: ")))


def test_chat_completions(live):
    for how in ({}, {"logprobs": True, "top_logprobs": 2}):
        response = live.chat(model="writer", messages=MESSAGES, **DETAILS, **how)
        ChatCompletion.model_validate_json(response.content)


def test_inference(live):
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}
    for body in ({"id": "a"}, {"parameters": {"binary_data_output": True}}):
        response = live.post("/v2/models/mood/infer", {"inputs": [tensor], **body})
        length = int(response.headers.get("inference-header-content-length", len(response.content)))
        InferResponse.model_validate_json(response.content[:length])
