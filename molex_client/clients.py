"""The two clients."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx
from pydantic import BaseModel

from molex_client.api import Api
from molex_client.closing import AsyncClosing, Closing
from molex_client.retries import Retries
from molex_client.streams import AsyncStream, Stream
from molex_client.transports import AsyncTransport, BlockingTransport, timeouts

P = ParamSpec("P")
T = TypeVar("T")
Piece = TypeVar("Piece", bound=BaseModel)
KEY_VARIABLE = "MOLEX_KEY"


class AsyncClient(Api, AsyncClosing):
    """Calls a molex-serve without blocking, in the event loop of asyncio.

    `url` is where it listens; `key` an API key, by default that of the environment variable MOLEX_KEY, if it
    has one. A call fails after `timeout` seconds without a byte from the server. What is safe to send again
    is, `retries` times at most; a call for which the server asks to wait longer than `longest_pause` seconds
    fails at once. Close it, or use it in `async with`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 60,
        retries: int = 2,
        longest_pause: float = 30,
    ) -> None:
        transport = AsyncTransport(**_options(url, key, timeout))
        super().__init__(transport, Retries(retries, longest_pause), timeout)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    def __repr__(self) -> str:
        return f"AsyncClient({str(self._transport.http.base_url)!r})"


def _blocking(
    method: Callable[Concatenate[Api, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """A call of the blocking client: the same, driven to its end."""

    @wraps(method)
    def call(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return _result(method(client._api, *args, **kwargs))

    return call


def _streaming(
    method: Callable[Concatenate[Api, P], Coroutine[Any, Any, AsyncStream[Piece]]],
) -> Callable[Concatenate[Client, P], Stream[Piece]]:
    @wraps(method)
    def call(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Stream[Piece]:
        opened = _result(method(client._api, *args, **kwargs))
        return Stream(opened.response, opened.events)

    return call


def _result(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine over a `BlockingTransport` returns: it never waits, so one step is all it takes."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("a blocking transport has waited for an event loop")


class Client(Closing):
    """Calls a molex-serve and blocks until it has answered. Threads may share one.

    What it takes is as in `AsyncClient`, and so are its calls. Close it, or use it in `with`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 60,
        retries: int = 2,
        longest_pause: float = 30,
    ) -> None:
        self._transport = BlockingTransport(**_options(url, key, timeout))
        self._api = Api(self._transport, Retries(retries, longest_pause), timeout)

    classify = _blocking(Api.classify)
    embed = _blocking(Api.embed)
    complete = _blocking(Api.complete)
    stream_completion = _streaming(Api.stream_completion)
    chat = _blocking(Api.chat)
    stream_chat = _streaming(Api.stream_chat)
    list_models = _blocking(Api.list_models)
    get_model = _blocking(Api.get_model)
    list_adapters = _blocking(Api.list_adapters)
    get_adapter = _blocking(Api.get_adapter)
    push_adapter = _blocking(Api.push_adapter)
    load_adapter = _blocking(Api.load_adapter)
    wait_for_adapter = _blocking(Api.wait_for_adapter)
    rollback_adapter = _blocking(Api.rollback_adapter)
    set_alias = _blocking(Api.set_alias)
    remove_alias = _blocking(Api.remove_alias)
    remove_adapter = _blocking(Api.remove_adapter)
    remove_version = _blocking(Api.remove_version)
    is_alive = _blocking(Api.is_alive)
    is_ready = _blocking(Api.is_ready)

    def close(self) -> None:
        """Close all connections."""
        self._transport.http.close()

    def __repr__(self) -> str:
        return f"Client({str(self._transport.http.base_url)!r})"


def _options(url: str, key: str | None, timeout: float) -> dict[str, Any]:
    """What both of httpx's clients take. Raises ValueError for a URL or a key that cannot be one."""
    try:
        base_url = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no URL: {error}") from error
    if base_url.userinfo:
        raise ValueError("the URL has a user name in it: servers want an API key instead")
    if base_url.scheme not in ("http", "https") or not base_url.host:
        raise ValueError(f"{url!r} is no URL of a server: it begins with http:// or https://")
    key = key or os.environ.get(KEY_VARIABLE)
    if key and not re.fullmatch(r"[\x21-\x7e]+", key):
        # Without the key: it would end up in logs.
        raise ValueError("the API key has a character that no key has")
    return {
        "base_url": base_url,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": timeouts(timeout),
    }
