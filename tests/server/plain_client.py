"""A client that costs next to nothing, for tests with many of them beside the server in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from email.message import Message
from http.client import HTTPConnection
from typing import Any

import httpx

Post = Callable[[str, dict[str, Any]], tuple[Any, Message]]


@contextmanager
def plain_client(url: str) -> Iterator[Post]:
    """Gives what posts a body over one connection and returns the JSON and the headers of a good answer.

    The threads of many httpx clients would keep the interpreter to themselves, and a server that runs beside
    them would wait for it.
    """
    address = httpx.URL(url)
    with closing(HTTPConnection(address.host, address.port or 80, timeout=60)) as connection:

        def post(path: str, body: dict[str, Any]) -> tuple[Any, Message]:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            assert response.status == 200, content
            return json.loads(content), response.headers

        yield post
