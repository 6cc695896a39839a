"""The OpenAPI document bounds whatever a request may hold, and shows every kind of answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from scripts.api_page import document

Schema = dict[str, Any]
BOUNDS = {
    "integer": ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}),
    "number": ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}),
    "string": ({"maxLength"},),
    "array": ({"maxItems"},),
}
SHAPES = {
    "open-inference-protocol": "V2Error",
    "text-embeddings-inference": "TeiError",
    "vllm": "VllmError",
}
"""Of errors, by the tag of a dialect."""
DOCUMENT = document()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}


def request_schemas(operation: Schema) -> Iterator[tuple[str, Schema]]:
    """Every schema of a request by the place that it describes, references followed."""
    left = [(p["name"], p["schema"]) for p in operation.get("parameters", ())]
    content = operation.get("requestBody", {}).get("content", {})
    left += [("body", body["schema"]) for kind, body in content.items() if kind == "application/json"]
    while left:
        place, schema = left.pop()
        if "$ref" in schema:
            schema = DOCUMENT["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        yield place, schema
        left += [(place, option) for key in ("anyOf", "oneOf", "allOf") for option in schema.get(key, ())]
        left += [(f"{place}.{name}", value) for name, value in schema.get("properties", {}).items()]
        left += [(f"{place}.*", value) for value in schema.get("patternProperties", {}).values()]
        left += [(f"{place}[]", schema["items"])] if "items" in schema else []


def unbounded(schema: Schema) -> bool:
    """Whether a value may be as large as it likes. Of an object without fields, its keys are counted."""
    if schema.keys() & {"const", "enum"}:
        return False
    if schema.get("type") == "object" and "properties" not in schema:
        return "maxProperties" not in schema
    return not all(bounds & schema.keys() for bounds in BOUNDS.get(schema.get("type", ""), ()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_numbers_texts_and_lists_of_a_request_are_bounded(name):
    assert [place for place, schema in request_schemas(OPERATIONS[name]) if unbounded(schema)] == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_body_has_no_fields_that_are_not_listed(name):
    objects = [(place, one) for place, one in request_schemas(OPERATIONS[name]) if "properties" in one]
    assert [place for place, one in objects if one.get("additionalProperties") is not False] == []


def test_the_walk_reaches_every_depth_of_a_body():
    places = {place for place, _ in request_schemas(OPERATIONS["POST /v1/chat/completions"])}
    assert {"body.messages[].content[].text", "body.logit_bias.*", "body.stop[]"} <= places
    assert "body.inputs[].shape[]" in {
        place for place, _ in request_schemas(OPERATIONS["POST /v2/models/{model}/infer"])
    }


@pytest.mark.parametrize(
    ("schema", "free"),
    [
        ({"type": "integer", "maximum": 3}, True),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 3}, False),
        ({"type": "string", "pattern": "^a{3}$"}, True),
        ({"type": "array", "maxItems": 3}, False),
        ({"type": "object", "additionalProperties": True}, True),
        ({"type": "object", "properties": {}}, False),
        ({"type": "boolean"}, False),
    ],
    ids=str,
)
def test_what_counts_as_unbounded(schema, free):
    assert unbounded(schema) == free


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_shows_its_errors(name):
    answers = OPERATIONS[name]["responses"]
    expected = SHAPES.get(OPERATIONS[name]["tags"][0], "ErrorAnswer")
    for status in ("4XX", "5XX"):
        schema = answers[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{expected}"}
    assert answers.keys() & {"200", "201", "204"}
