"""What a server is doing, as its metrics tell, and a client that need not wait for its answer."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx

from tests.server.conftest import Live

LONG = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}


def running(live: Live) -> float:
    return live.metrics()['molex_running_sequences{base="dec"}']


def idle(live: Live) -> bool:
    """Nothing runs or waits, and every page of the cache is free."""
    left = running(live) + waiting(live, "dec") + waiting(live, "enc")
    return left == 0 and all_free(live)


def all_free(live: Live) -> bool:
    runner = live.engine.bases["dec"].runner
    return runner.num_free_pages == runner.num_pages


def send(live: Live, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """Send a request and return the connection, for a client that will not wait for the answer."""
    content = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    url = httpx.URL(live.url)
    connection = socket.create_connection((url.host, url.port))
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n{content}".encode())
    return connection


def waiting(live: Live, base: str) -> float:
    return live.metrics()[f'molex_queue_depth{{base="{base}"}}']
