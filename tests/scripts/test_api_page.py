from __future__ import annotations

import pytest

from scripts.api_page import PAGE, document, render, spell


def test_the_page_is_that_of_the_openapi_document():
    # `python -m scripts.api_page` writes it anew.
    assert PAGE.read_text(encoding="utf-8") == render(document())


def test_every_route_is_on_the_page_with_an_answer():
    sections = PAGE.read_text(encoding="utf-8").split("\n### ")
    for path, methods in document()["paths"].items():
        for method in methods:
            [section] = [s for s in sections if s.startswith(f"`{method.upper()} {path}`\n")]
            assert "\n- 20" in section


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 5}, "integer (from 1, to 5)"),
        ({"anyOf": [{"$ref": "#/components/schemas/Text"}, {"type": "null"}]}, "[Text](#text) or null"),
        ({"type": "array", "items": {"enum": ["a", 3]}, "maxItems": 2}, "list of `a` or `3` (at most 2)"),
        ({"type": "object", "properties": {"x": {"const": True}}}, "object with `x`: `true`"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number"),
        ({"type": "string", "contentSchema": {"$ref": "#/components/schemas/Text"}}, "[Text](#text)"),
        ({}, "any value"),
    ],
)
def test_schemas_in_words(schema, words):
    assert spell(schema) == words
