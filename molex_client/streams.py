"""Answers that come in pieces, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

import httpx
from pydantic import BaseModel

from molex_client.closing import AsyncClosing, Closing
from molex_client.errors import ConnectionFailedError, failure, refusal_in_stream
from molex_client.reading import parse, read_json

T = TypeVar("T", bound=BaseModel)
DONE = b"[DONE]"


class EventReader(Generic[T]):
    """Turns the bytes of a stream into its pieces."""

    def __init__(self, kind: type[T], request_id: str | None) -> None:
        self._kind = kind
        self._request_id = request_id
        self._rest = b""
        self._done = False

    def feed(self, data: bytes) -> Iterator[T]:
        """The pieces that are complete with this data.

        Raises ApiError for an event with an error, and BadAnswerError for what is no event. Only newlines end
        a line here: text may hold others of Unicode's line ends.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            name, _, value = line.strip().partition(b":")
            if name != b"data":
                continue
            if value.strip() == DONE:
                self._done = True
            elif not self._done:
                yield self._piece(value)

    def end(self) -> None:
        """Raises ConnectionFailedError where the stream has stopped before it was complete."""
        if not self._done:
            raise ConnectionFailedError("the stream ended early", sent=True)

    def _piece(self, data: bytes) -> T:
        content = read_json(data)
        if isinstance(content, dict) and "error" in content:
            raise refusal_in_stream(content["error"], self._request_id)
        return parse(self._kind, content)


class AsyncStream(AsyncClosing, Generic[T]):
    """An answer in pieces, for `async for`. Leaving `async with` early closes it, and the server stops."""

    def __init__(self, response: httpx.Response, events: EventReader[T]) -> None:
        self.response = response
        self.events = events

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            async for data in self.response.aiter_bytes():
                for piece in self.events.feed(data):
                    yield piece
            self.events.end()
        except httpx.HTTPError as error:
            raise failure(error) from error
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End the request; the server stops working on it."""
        await self.response.aclose()


class Stream(Closing, Generic[T]):
    """An answer in pieces, for `for`. Leaving `with` or the loop early closes it, and the server stops."""

    def __init__(self, response: httpx.Response, events: EventReader[T]) -> None:
        self._response = response
        self._events = events

    def __iter__(self) -> Iterator[T]:
        try:
            for data in self._response.iter_bytes():
                yield from self._events.feed(data)
            self._events.end()
        except httpx.HTTPError as error:
            raise failure(error) from error
        finally:
            self.close()

    def close(self) -> None:
        """End the request; the server stops working on it."""
        self._response.close()
