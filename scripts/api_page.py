"""Writes docs/api.md: every route with its request and its answer, from the OpenAPI document.

    python -m scripts.api_page

tests/scripts/test_api_page.py compares the page with the document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from server.adapters import AdapterStore
from server.app import create_app
from server.auth.access import Access
from server.engine import Engine
from server.metrics import Metrics
from server.settings import Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
INTRODUCTION = """# HTTP routes

Made from the service's OpenAPI document by `python -m scripts.api_page`; the running server shows it at
`/docs` and `/openapi.json`. A field or query parameter that is not listed is refused by name. `…` stands for
a value that is different every time, or left out.
"""
Schema = dict[str, Any]


def document() -> Schema:
    """The OpenAPI document."""
    return application().openapi()


def application() -> FastAPI:
    """The application, for which no base is loaded."""
    settings = Settings.model_validate({"bases": {"base": "folder"}})
    metrics = Metrics()
    adapters = AdapterStore({}, settings, metrics)
    return create_app(Engine(settings, {}, adapters, metrics), Access())


def render(openapi: Schema) -> str:
    """The page for an OpenAPI document."""
    objects = openapi["components"]["schemas"]
    by_tag: dict[str, list[str]] = {}
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            text = "\n".join(_route(f"{method.upper()} {path}", operation))
            by_tag.setdefault(operation["tags"][0], []).append(text)
    parts = [INTRODUCTION]
    for tag, routes in by_tag.items():
        parts += [f"## {tag.capitalize()}\n", *routes]
    parts.append("## Objects\n")
    parts += ["\n".join(_object(name, objects[name])) for name in sorted(objects)]
    return "\n".join(parts)


def _route(title: str, operation: Schema) -> Iterator[str]:
    yield f"### `{title}`\n"
    yield f"{operation.get('description') or operation['summary']}\n"
    for parameter in operation.get("parameters", ()):
        need = "required" if parameter["required"] else "optional"
        yield f"- {parameter['in']} `{parameter['name']}` ({need}): {spell(parameter['schema'])}"
    if "requestBody" in operation:
        yield f"- request: {_content(operation['requestBody']['content'])}"
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            yield f"- {status}: {_content(answer.get('content', {}))}"
    yield ""


def _content(content: Schema) -> str:
    return " or ".join(_body(kind, body) for kind, body in content.items()) or "no body"


def _body(kind: str, body: Schema) -> str:
    if "itemSchema" in body:
        return f"events ({spell(body['itemSchema']['properties']['data'])})"
    return spell(body["schema"]) if body.get("schema") else kind


def _object(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}\n"
    if "description" in schema:
        yield schema["description"] + "\n"
    if "properties" not in schema:
        yield f"{spell(schema)}\n"
        return
    yield "| field | value | default |"
    yield "|---|---|---|"
    for field, value in schema["properties"].items():
        required = field in schema.get("required", ())
        yield f"| `{field}` | {spell(value)} | {'required' if required else _default(value)} |"
    yield ""


def _default(value: Schema) -> str:
    default = value.get("default", ...)
    return "…" if default is ... else f"`{_literal(default)}`"


def spell(schema: Schema) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "contentSchema" in schema:
        return spell(schema["contentSchema"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(spell, options)))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"`{_literal(value)}`" for value in values)
    kind = schema.get("type", "any value")
    if kind == "array":
        items = schema.get("items") or schema.get("prefixItems", [{}])[0]
        return f"list of {spell(items)}" + _bounds(schema)
    if "properties" in schema:
        fields = (f"`{name}`: {spell(value)}" for name, value in schema["properties"].items())
        return f"object with {'; '.join(fields)}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return "object" + (f" of {spell(values)}" if isinstance(values, dict) else "") + _bounds(schema)
    return str(kind) + _bounds(schema)


BOUNDS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "to {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "maxProperties": "at most {}",
    "pattern": "like `{}`",
}


def _bounds(schema: Schema) -> str:
    found = [words.format(schema[name]) for name, words in BOUNDS.items() if name in schema]
    return f" ({', '.join(found)})" if found else ""


def _literal(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(render(document()), encoding="utf-8")
