"""HTTP/1.1 as uvicorn speaks it, with an end to the patience with slow clients."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class JoinedWrites:
    """A transport that sends together what is written in one turn of the event loop.

    uvicorn writes the head of an answer and its body one by one: two system calls, after each of which the
    client wakes up.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append(data)

    def _send(self) -> None:
        if self._parts and not self._transport.is_closing():
            self._transport.write(b"".join(self._parts))
        self._parts.clear()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedProtocol(H11Protocol):
    """Cuts off clients that never end their headers, or a body that nobody waits for, or read no answer.

    Bodies that are waited for are `BodyLimit`'s; idle connections are uvicorn's.
    """

    client_seconds: float
    """How long a client may take for each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase: tuple[object, object] | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport, self.loop))  # type: ignore[arg-type]
        self._time_sender()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_sender()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._sending, self._reading):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.client_seconds, self._reset)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: clients that offer HTTP/2 too, as Java's does, get HTTP/1.1."""

    def _reset(self) -> None:
        """End the connection at once: closing it would wait for the client to read what it was sent."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _time_sender(self) -> None:
        """Begin to count where the client has begun to send headers or a body."""
        phase = (self.cycle, self.conn.their_state)
        if phase == self._phase:
            return
        self._phase = phase
        if self._sending is not None:
            self._sending.cancel()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._sending = self.loop.call_later(self.client_seconds, self._cut_off)

    def _cut_off(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            message = b"the headers took too long\n"
            headers = [("content-length", str(len(message))), ("connection", "close")]
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=message),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()
        elif self.cycle.response_complete:
            self.transport.close()
        else:
            self._sending = self.loop.call_later(self.client_seconds, self._cut_off)


def bounded_protocol(seconds: float) -> type[BoundedProtocol]:
    """The protocol for clients that may take so long."""
    return type("Protocol", (BoundedProtocol,), {"client_seconds": seconds})
