"""Server-sent events, whole and broken."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molex_client import Client, Completion, ConnectionFailedError, OverloadedError
from molex_client.errors import BadAnswerError
from molex_client.streams import EventReader
from server.errors import ErrorKind, ServiceError
from tests.molex_client.conftest import event_stream


def chunk(text: str) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    content = {"id": "c", "created": 1, "model": "m", "choices": [choice], "adapter_digest": None}
    return json.dumps(content, ensure_ascii=False).encode()


def texts(pieces: list[Completion]) -> list[str]:
    return [piece.choices[0].text for piece in pieces]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.integers(1, 40))
def test_pieces_do_not_depend_on_how_the_bytes_come(words, size):
    data = b"".join(b"data: " + chunk(word) + b"\n\n" for word in words) + b"data: [DONE]\n\n"
    reader = EventReader(Completion, None)
    parts = [data[begin : begin + size] for begin in range(0, len(data), size)]
    assert texts([piece for part in parts for piece in reader.feed(part)]) == words
    reader.end()


def test_comments_other_fields_and_carriage_returns_are_no_pieces():
    reader = EventReader(Completion, None)
    data = b": ping\r\n\r\nevent: x\r\ndata:" + chunk("a") + b"\r\n\r\ndata: [DONE]\r\n\r\ndata: late\n"
    assert texts(list(reader.feed(data))) == ["a"]
    reader.end()


def test_an_error_in_a_stream_is_raised_after_what_came_before(script):
    error = ServiceError(ErrorKind.OVERLOADED, "too much").body()
    script.answers = [event_stream(chunk("a"), json.dumps(error).encode(), b"[DONE]")]
    with Client(script.url) as client, client.stream_completion("m", "x") as stream:
        pieces = iter(stream)
        assert texts([next(pieces)]) == ["a"]
        with pytest.raises(OverloadedError, match="too much") as caught:
            next(pieces)
    assert caught.value.request_id == "r1"


def test_a_stream_that_ends_early_is_no_whole_answer(call, script):
    script.answers = [event_stream(chunk("a"))]
    with pytest.raises(ConnectionFailedError, match="ended early"):
        call(script.url, "stream_completion", "m", "x")


def test_a_stream_whose_connection_breaks_says_so(call, script):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    script.answers = [head + b"5\r\ndata"]
    with pytest.raises(ConnectionFailedError, match="the connection failed"):
        call(script.url, "stream_completion", "m", "x")


@pytest.mark.parametrize("event", [b"{", b"5", b'{"id": "c"}'])
def test_an_event_that_is_no_piece_is_refused(call, script, event):
    script.answers = [event_stream(event)]
    with pytest.raises(BadAnswerError):
        call(script.url, "stream_completion", "m", "x")
