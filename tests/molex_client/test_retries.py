"""What is sent again, and after how long."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from molex_client import (
    ApiError,
    ConnectionFailedError,
    OverloadedError,
    ServerError,
    TimedOutError,
)
from molex_client.errors import refusal
from molex_client.retries import Retries
from tests.molex_client.conftest import answer

MODELS = answer(200, {"object": "list", "data": []})
BUSY = {"error": {"message": "the queue is full", "type": "overloaded_error", "code": "queue_full"}}
CUT = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"


def test_a_busy_server_is_asked_again_when_it_says(call, script, pauses):
    script.answers = [answer(429, BUSY, retry_after="3"), answer(503, BUSY, retry_after="0"), MODELS]
    assert call(script.url, "list_models") == []
    assert pauses == [3, 0]
    assert len(script.heads) == 3


def test_pauses_grow_where_the_server_names_none(call, script, pauses):
    script.answers = [answer(503), answer(502), answer(504), MODELS]
    assert call(script.url, "list_models", options={"retries": 3}) == []
    assert [0.25 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(pauses)] == [True] * 3


def test_after_the_last_attempt_the_error_stands(call, script, pauses):
    script.answers = [answer(429, BUSY, retry_after="1")] * 3
    with pytest.raises(OverloadedError, match="the queue is full") as caught:
        call(script.url, "list_models")
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "queue_full", 1)
    assert pauses == [1, 1]


def test_nobody_waits_longer_than_the_bound(call, script, pauses):
    script.answers = [answer(429, BUSY, retry_after="31")]
    with pytest.raises(OverloadedError):
        call(script.url, "list_models")
    assert pauses == []


def test_a_broken_connection_is_tried_again(call, script, pauses):
    script.answers = [CUT, b"", MODELS]
    assert call(script.url, "list_models") == []
    assert len(pauses) == 2


def test_what_may_have_happened_is_not_done_twice(call, script, pauses):
    """A rollback to the version before goes back further each time."""
    for broken in (CUT, answer(503, BUSY, retry_after="0")):
        script.answers = [broken]
        with pytest.raises((ConnectionFailedError, ServerError)):
            call(script.url, "rollback_adapter", "sst2")
    assert pauses == []
    script.answers = [answer(429, BUSY), CUT]
    with pytest.raises(ConnectionFailedError):
        call(script.url, "rollback_adapter", "sst2")
    assert len(pauses) == 1
    # To a named version, twice is the same as once.
    script.answers = [CUT, answer(404, BUSY)]
    with pytest.raises(ApiError):
        call(script.url, "rollback_adapter", "sst2", 3)
    assert len(pauses) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 500, 504])
def test_what_would_end_the_same_way_is_final(call, script, pauses, status):
    script.answers = [answer(status, BUSY)]
    with pytest.raises(ApiError):
        call(script.url, "list_models")
    assert pauses == []


def test_a_timeout_is_final(call, script, pauses):
    script.answers = [None]
    with pytest.raises(TimedOutError, match="no answer in time"):
        call(script.url, "list_models", options={"timeout": 0.05})
    assert pauses == []


@pytest.mark.parametrize("method", ["classify", "embed", "complete"])
@pytest.mark.parametrize(("timeout", "told"), [(0.5, "0.5"), (60, "60"), (1e6, "86400")])
def test_the_server_is_told_when_the_client_gives_up(call, script, method, timeout, told):
    script.answers = [answer(400, BUSY), answer(400, BUSY)]
    with pytest.raises(ApiError):
        call(script.url, method, "m", "w1", options={"timeout": timeout})
    with pytest.raises(ApiError):
        call(script.url, "chat", "m", [], options={"timeout": timeout})
    assert all(f"x-request-timeout: {told}\r\n" in head for head in script.heads)


@pytest.mark.parametrize("method", ["stream_completion", "stream_chat"])
def test_a_stream_may_last(call, script, method):
    script.answers = [answer(400, BUSY)]
    with pytest.raises(ApiError):
        call(script.url, method, "m", [])
    assert "x-request-timeout" not in script.heads[0]


def test_a_server_that_is_not_there_is_tried_again(call, script, pauses):
    with pytest.raises(ConnectionFailedError) as caught:
        call("http://127.0.0.1:1", "rollback_adapter", "sst2")
    assert not caught.value.sent
    assert len(pauses) == 2


def test_a_date_to_retry_after_is_understood():
    class Response:
        status_code, reason_phrase, headers = 429, "", {}

        def json(self):
            raise ValueError

    Response.headers = {"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=20))}
    error = refusal(Response())
    assert 15 < error.retry_after <= 20
    assert Retries(1, 30).pause(error, 1, repeatable=False) == error.retry_after
    Response.headers = {"retry-after": "soon"}
    assert refusal(Response()).retry_after is None
