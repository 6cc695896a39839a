"""Every refusal of the server is an exception that says what it said."""

from __future__ import annotations

import pytest

import molex_client
from molex_client import (
    ApiError,
    AuthenticationError,
    BadAnswerError,
    ClientError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ServerError,
)
from molex_client.errors import refusal_in_stream
from server.errors import ErrorKind, ServiceError
from tests.molex_client.conftest import answer

KINDS = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    429: OverloadedError,
}


def kind_of(kind: ErrorKind) -> type[ApiError]:
    return KINDS.get(kind.status, ServerError if kind.status >= 500 else InvalidRequestError)


@pytest.mark.parametrize("kind", ErrorKind)
def test_an_error_of_the_server_keeps_its_words(call, script, kind):
    error = ServiceError(kind, "it said no", param="field")
    script.answers = [answer(kind.status, error.body(), x_request_id="r7")]
    with pytest.raises(ApiError) as caught:
        call(script.url, "list_models", options={"retries": 0})
    assert type(caught.value) is kind_of(kind)
    assert (caught.value.status, caught.value.code) == (kind.status, kind.code)
    assert (caught.value.param, caught.value.request_id) == ("field", "r7")
    assert str(caught.value) == f"it said no ({kind.status}, {kind.code}, request r7)"


@pytest.mark.parametrize("kind", ErrorKind)
def test_inside_a_stream_the_type_says_which_it_is(kind):
    error = refusal_in_stream(ServiceError(kind, "it said no").body()["error"], "r7")
    assert type(error) is kind_of(kind)
    assert (error.status, error.request_id) == (None, "r7")


@pytest.mark.parametrize("content", [None, [], "text", {"error": "text"}, {"error": {"message": 5}}])
def test_a_refusal_of_something_else_is_told_by_its_status(call, script, content):
    script.answers = [answer(418, content)]
    with pytest.raises(InvalidRequestError, match="the server answered 418"):
        call(script.url, "list_models")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "no JSON"),
        (b"[]", "the answer: "),
        (b'{"data": [{"id": 5}]}', r"data\.0\.id: "),
        (b'{"data": [{}]}', r"data\.0\.id: Field required"),
    ],
)
def test_an_answer_of_another_kind_of_server_is_told_apart(call, script, content, words):
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    script.answers = [head.encode() + content]
    with pytest.raises(BadAnswerError, match=words):
        call(script.url, "list_models")


def test_the_tree_in_the_docstring_is_the_tree():
    classes = [item for item in vars(molex_client).values() if isinstance(item, type)]
    errors = {item.__name__ for item in classes if issubclass(item, ClientError)}
    doc = molex_client.errors.__doc__ or ""
    assert {word for word in doc.replace("└", " ").split() if word.endswith("Error")} == errors
