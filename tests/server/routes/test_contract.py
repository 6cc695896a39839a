"""Whatever is generated from the OpenAPI document, valid or not, gets an answer that the document shows."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from scripts.api_page import document
from server.routes.access import TIMEOUT_HEADER
from tests.server.routes.test_access import OPEN

CONFORMANCE = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = {result.ok().label: result.ok() for result in SCHEMA.get_all_operations()}
WRITES = {f"POST /v2/repository/models/{{model}}/{verb}" for verb in ("load", "unload")}
"""Of a caller's own adapter of that name."""
MODELS = ["secret", "mood", "topic", "writer", "poet", "judge", "enc", "dec", "nobody"]


def naming(case: Case, model: str) -> bool:
    """Let a valid request name this model, if it names any: a name that is generated is nobody's."""
    if case.meta.generation.mode is GenerationMode.NEGATIVE:
        return False
    places = [case.body, case.path_parameters, case.query]
    named = [fields for fields in places if isinstance(fields, dict) and fields.get("model") is not None]
    for fields in named:
        fields["model"] = model
    return bool(named)


def wait_for_answers(case: Case) -> None:
    """Leave out timeouts that are over before any answer, which is rightly 504."""
    for name, value in (case.headers or {}).items():
        with suppress(ValueError):
            if name == TIMEOUT_HEADER and 0 < float(value) < 1:
                case.headers[name] = "60"


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_answer_is_documented_whoever_asks(scene, acme, other, name, examples):
    live, _ = scene
    operation = OPERATIONS[name]
    session = requests.Session()
    open_to_all = operation.path in OPEN

    def ask(case: Case, headers: Any, checks: list[Any]) -> int:
        response = case.call(base_url=live.url, session=session, headers=headers)
        case.validate_response(response, checks=checks)
        return response.status_code

    @settings(max_examples=examples, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(map(operation.as_strategy, GenerationMode)), st.sampled_from(MODELS))
    def check(case: Case, model: str) -> None:
        # No route has a path with a line break.
        assume("%0A" not in str(case.path_parameters))
        wait_for_answers(case)
        named = naming(case, model)
        owner, neighbour = ({"authorization": client.headers["authorization"]} for client in (acme, other))
        # 424 is how TEI spells a fault of the server.
        assert ask(case, owner, [*CONFORMANCE, negative_data_rejection]) != 424
        status = ask(case, neighbour, CONFORMANCE)
        assert status != 424
        assert status >= 400 or open_to_all or name in WRITES or not (named and model == "secret")
        assert open_to_all or ask(case, {}, CONFORMANCE) == 401

    check()


CHAT = {"messages": [{"role": "user", "content": "w1 w2"}]}
DETAILS = {"n": 2, "return_routes": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("POST /v1/completions", {"prompt": "w1"}),
        ("POST /v1/completions", {"prompt": "w1", "logprobs": 1, **DETAILS}),
        ("POST /v1/chat/completions", CHAT),
        ("POST /v1/chat/completions", {"logprobs": True, "top_logprobs": 1, **CHAT, **DETAILS}),
    ],
)
def test_every_event_of_a_stream_is_documented(live, name, body):
    body = {"model": "writer", "stream": True, "max_tokens": 3, **body}
    case = OPERATIONS[name].Case(body=body, media_type="application/json")
    response = case.call(base_url=live.url)
    assert response.status_code == 200
    case.validate_response(response, checks=CONFORMANCE)
