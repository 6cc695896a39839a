"""Text that follows a grammar, from the compiler to OpenAI's client. The model is random: only the grammar
makes its text anything."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from server.errors import ServiceError
from server.grammar import GrammarRequest

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "maxItems": 3}
CODE = {"type": "string", "pattern": "^[A-C]{2}-[0-9]{3}$"}
SPACE, CLOSING_BRACE = "96", "95"
# A random model would fill the context with spaces.
NO_SPACES = {"logit_bias": {SPACE: -100}}


def json_schema(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def complete(chars, **body):
    return chars.complete(**{"model": "chars", "prompt": "{", "max_tokens": 90, **NO_SPACES, **body})


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    assert choice["finish_reason"] == "stop", choice
    return choice["text"]


@pytest.fixture
def compiler(chars):
    return chars.engine.bases["chars"].tokenization.grammars


@pytest.fixture
def client(chars):
    with openai.OpenAI(base_url=f"{chars.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("schema", [PERSON, LIST, CODE, {"const": {"a": [1, "b"]}}], ids=str)
@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "temperature": 2, "top_p": 0.9}]
)
def test_text_follows_its_schema(chars, schema, how):
    jsonschema.validate(
        json.loads(text_of(complete(chars, response_format=json_schema(schema), **how))), schema
    )


LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["on", 3, None]},
        {"type": "string", "maxLength": 3},
        {"type": "integer", "minimum": -9, "maximum": 20},
        {"const": [True]},
    ]
)
OBJECTS = st.dictionaries(st.sampled_from(["a", "b", "c d"]), LEAVES, min_size=1).map(
    lambda fields: {
        "type": "object",
        "properties": fields,
        "required": sorted(fields),
        "additionalProperties": False,
    }
)
ARRAYS = LEAVES.map(lambda item: {"type": "array", "items": item, "maxItems": 3})
EITHER = st.lists(LEAVES, min_size=2, max_size=3).map(lambda schemas: {"anyOf": schemas})


@settings(max_examples=25)
@given(schema=st.one_of(LEAVES, OBJECTS, ARRAYS, EITHER), seed=st.integers(0, 99))
def test_any_text_follows_any_schema(chars, schema, seed):
    text = text_of(complete(chars, response_format=json_schema(schema), seed=seed))
    jsonschema.validate(json.loads(text), schema)


def test_text_ends_with_its_grammar_even_where_the_end_token_is_ignored(chars):
    text = text_of(complete(chars, response_format=json_schema(LIST), ignore_eos=True, seed=4))
    assert isinstance(json.loads(text), list)


def test_a_text_cut_by_its_limit_says_so(chars):
    [choice] = complete(chars, response_format=json_schema(PERSON), max_tokens=3).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["text"] == '{"n'


def test_json_objects_of_any_kind(chars):
    # A random object would go on for long.
    text = text_of(complete(chars, response_format={"type": "json_object"}, logit_bias={CLOSING_BRACE: 100}))
    assert isinstance(json.loads(text), dict)
    long = complete(chars, response_format={"type": "json_object"}, seed=1).json()["choices"][0]["text"]
    assert long.startswith("{")


def test_vllms_structured_outputs(chars):
    regex = text_of(complete(chars, structured_outputs={"regex": "[a-f]{4}/[0-9]+x"}, seed=1))
    assert re.fullmatch("[a-f]{4}/[0-9]+x", regex)
    choices = ["yes", 'say "no"', "neither\\nor"]
    assert text_of(complete(chars, structured_outputs={"choice": choices}, seed=2)) in choices
    parsed = json.loads(text_of(complete(chars, structured_outputs={"json": CODE}, seed=3)))
    jsonschema.validate(parsed, CODE)


def test_choices_follow_the_grammar_each_in_its_own_place(chars):
    answer = complete(chars, response_format=json_schema(PERSON), n=4, seed=1).json()
    for choice in answer["choices"]:
        jsonschema.validate(json.loads(choice["text"]), PERSON)
    assert len({choice["text"] for choice in answer["choices"]}) == 4


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Literal["small", "large"]
    count: int = Field(ge=0, le=99)


def test_openais_client_parses_what_it_asked_for(client):
    answer = client.chat.completions.parse(
        model="chars", messages=[{"role": "user", "content": "?"}], response_format=Item, seed=1, **NO_SPACES
    )
    item = answer.choices[0].message.parsed
    assert item is not None
    assert item.size in ("small", "large")


def test_a_stream_follows_the_schema(client):
    stream = client.completions.create(
        model="chars",
        prompt="{",
        max_tokens=90,
        stream=True,
        seed=5,
        extra_body={"response_format": json_schema(PERSON)},
        **NO_SPACES,
    )
    jsonschema.validate(json.loads("".join(chunk.choices[0].text for chunk in stream)), PERSON)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        # A schema cannot talk the library into ignoring what it lacks.
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, 'Unimplemented keys: ["not"]'),
        ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
        ({"type": "thing"}, "thing"),
        ({"$ref": "file:///etc/passwd"}, "not present"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "#"}, "no text follows it"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "string", "description": "x" * 70_000}, "longer than 65536 characters"),
        ({"allOf": [{"anyOf": [{"minLength": i}, {"pattern": f"{i}+"}]} for i in range(12)]}, "large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_library_cannot_do_is_refused(chars, schema, words):
    response = complete(chars, response_format=json_schema(schema))
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == "response_format"
    assert words in error["message"]


@pytest.mark.parametrize("depth", [130, 300, 900])
def test_deep_schemas_are_refused(chars, depth):
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    response = complete(chars, response_format=json_schema(schema))
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": None}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= 'a'"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None),
        ({"guided_json": {}}, "guided_json"),
    ],
    ids=str,
)
def test_bad_fields_are_refused_by_name(chars, body, param):
    response = complete(chars, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_tokenizer_that_spells_no_bytes_is_refused(live):
    response = live.complete(model="dec", prompt="w1", response_format={"type": "json_object"})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "response_format",
        "unsupported_parameter",
    )
    assert "tokenizer of this base" in error["message"]


def test_without_the_library_the_answer_says_what_to_install(compiler, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ServiceError, match=r"molex-serve\[structured\]") as refused:
        compiler.compile(GrammarRequest("json_schema", PERSON, "response_format"))
    assert refused.value.param == "response_format"


def test_a_dead_end_is_the_callers_and_harms_nobody_else(chars):
    # The tokenizer has no ~, which shows only when it is due.
    bodies = [{"structured_outputs": {"regex": "ab~"}}, {"structured_outputs": {"regex": "ab[~]?"}}]
    with ThreadPoolExecutor() as pool:
        dead, alive = pool.map(lambda body: complete(chars, **body), bodies)
    assert dead.status_code == 400
    assert dead.json()["error"]["message"] == "structured_outputs: no text follows it"
    assert text_of(alive) == "ab"
