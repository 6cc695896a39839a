"""Clients that are slow on purpose, over plain sockets."""

from __future__ import annotations

import asyncio
import json
import select
import socket
from itertools import repeat

import httpx
import pytest

from server.protocol import JoinedWrites
from tests.server.conftest import live_server

HEAD = b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = json.dumps({"model": "mood", "input": "w1"}).encode()
WHOLE = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(scope="module")
def live(settings):
    with live_server(settings.model_copy(update={"max_client_seconds": 1})) as server:
        yield server


@pytest.fixture
def connection(live):
    url = httpx.URL(live.url)
    with socket.create_connection((url.host, url.port), timeout=60) as made:
        yield made


def trickle(connection: socket.socket, piece: bytes) -> bytes:
    """Send a piece now and then until the server ends the connection; returns what it said."""
    said = b""
    for _ in repeat(None, 1000):
        readable, _, _ = select.select([connection], [], [], 0.05)
        try:
            if not readable:
                connection.sendall(piece)
            elif more := connection.recv(65536):
                said += more
            else:
                return said
        except (ConnectionResetError, BrokenPipeError):
            return said
    raise AssertionError("the server never ended the connection")


def until_closed(connection: socket.socket) -> bytes:
    said = b""
    while more := connection.recv(65536):
        said += more
    return said


def answered(connection: socket.socket) -> bytes:
    """One answer, whose body is JSON."""
    said = b""
    while not said.endswith(b"}"):
        said += connection.recv(65536)
    return said


def test_headers_that_never_end_are_cut_off(connection):
    connection.sendall(HEAD)
    assert trickle(connection, b"x-more: 1\r\n").startswith(b"HTTP/1.1 408 ")


def test_a_client_that_says_nothing_is_cut_off(connection):
    assert until_closed(connection).startswith(b"HTTP/1.1 408 ")


def test_headers_of_a_later_request_are_cut_off_too(connection):
    connection.sendall(WHOLE)
    assert answered(connection).startswith(b"HTTP/1.1 200 ")
    connection.sendall(HEAD)
    assert trickle(connection, b"x-more: 1\r\n").startswith(b"HTTP/1.1 408 ")


def test_a_body_that_never_ends_is_refused_and_counted(live, connection):
    connection.sendall(HEAD + b"content-length: 4000\r\n\r\n")
    said = trickle(connection, b" ")
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert live.metrics()['molex_requests_total{route="/v1/classify",status="408"}'] == 1


@pytest.mark.parametrize("path", ["/tei/mood/predict", "/v2/models/mood/infer", "/classify"])
def test_a_slow_body_ends_the_connection_on_the_routes_of_other_apis_too(connection, path):
    connection.sendall(HEAD.replace(b"/v1/classify", path.encode()) + b"content-length: 4000\r\n\r\n")
    head = trickle(connection, b" ").partition(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head


@pytest.mark.parametrize("path", [b"/livez", b"/no/such/path"])
def test_a_body_that_nobody_reads_is_cut_off(connection, path):
    connection.sendall(b"GET %b HTTP/1.1\r\nhost: x\r\ncontent-length: 4000\r\n\r\n" % path)
    assert b"408" not in trickle(connection, b" ").partition(b"\r\n")[0]


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_a_client_that_offers_another_protocol_is_answered_in_this_one(connection, offer, caplog):
    upgrade = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\ncontent-length: " % offer
    for _ in range(2):
        connection.sendall(WHOLE.replace(b"content-length: ", upgrade))
        assert answered(connection).startswith(b"HTTP/1.1 200 ")
    assert not caplog.records


def test_an_idle_connection_is_closed(connection):
    connection.sendall(WHOLE)
    said = until_closed(connection)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.endswith(b"}")


def test_a_slow_step_is_no_slow_client(live, connection, brake):
    held = brake(live, "enc")
    connection.sendall(WHOLE)
    # Nothing comes for longer than a client has.
    assert select.select([connection], [], [], 2) == ([], [], [])
    held.release()
    assert answered(connection).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_is_cut_off(live):
    url = httpx.URL(live.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((url.host, url.port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
        poll = select.poll()
        poll.register(connection, select.POLLHUP)
        assert poll.poll(60_000)
        with pytest.raises(ConnectionResetError):
            until_closed(connection)


class Sent:
    """A transport that keeps what it is told to send."""

    def __init__(self):
        self.parts, self.closed = [], False

    def write(self, data):
        assert not self.closed
        self.parts.append(data)

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed


async def turns(sent, *writes):
    """Write some parts in each turn of the event loop."""
    transport = JoinedWrites(sent, asyncio.get_running_loop())
    for parts in writes:
        for part in parts:
            transport.write(part)
        await asyncio.sleep(0)


def test_what_is_written_in_one_turn_is_sent_together():
    sent = Sent()
    asyncio.run(turns(sent, [b"head ", b"body"], [b"more"]))
    assert sent.parts == [b"head body", b"more"]


def test_what_is_left_is_sent_before_the_end_and_nothing_after_it():
    async def write_and_close():
        transport = JoinedWrites(sent, asyncio.get_running_loop())
        transport.write(b"last")
        transport.close()
        transport.write(b"late")
        await asyncio.sleep(0)

    sent = Sent()
    asyncio.run(write_and_close())
    assert (sent.parts, sent.closed) == ([b"last"], True)
