"""A server that speaks every dialect, over real HTTP. What it does is told by the name of the model."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PIECES = ("a", " b", " c")
EMBEDDING = {"object": "embedding", "index": 0, "embedding": [0.5, 0.5]}
ANSWERS: dict[str, Any] = {
    "/v1/classify": {"index": 0, "label": "good", "probs": [0.25, 0.75], "num_classes": 2},
    "/classify": [{"label": "good", "score": 0.75}],
    "/embeddings": EMBEDDING,
    "/v1/embeddings": EMBEDDING,
}
"""What the dialects have for one text."""
TIMES = {
    "stages": {"x-queue-time": "2.000", "x-inference-time": "5"},
    "nonsense": {"x-inference-time": "soon"},
}


class Stub:
    """Counts what it gets and times what it does.

    Models: `80ms` answers after 80 milliseconds (a stream: 80 before each piece); `crowd` when `crowd_size`
    requests wait; `503` with that status; `never` not at all; `cut` breaks off; `garbage` is no JSON; `empty`
    answers with no results; `stages` says that its answer waited for 2 ms and took 5, `nonsense` that it took
    soon.
    """

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.callers: list[tuple[str, int]] = []
        """The other end of the connection that each request came on."""
        self.seconds: list[float] = []
        """How long each request took here, by the clock of this process."""
        self.crowd_size = 0
        self._crowded = asyncio.Event()
        routes = [Route(path, self._answer, methods=["POST"]) for path in (*ANSWERS, "/v1/completions")]
        self.app = Starlette(routes=routes)

    async def _answer(self, request: Request) -> Response:
        begin = time.perf_counter()
        body = await request.json()
        model = body["model"]
        self.received[model] += 1
        self.bodies.append(body)
        assert request.client is not None
        self.callers.append((request.client.host, request.client.port))
        if model == "never":
            while (await request.receive())["type"] != "http.disconnect":
                pass
        if model == "crowd":
            await self._wait_for_crowd()
        response = await self._respond(request.url.path, model, len(body.get("input", [])))
        self.seconds.append(time.perf_counter() - begin)
        return response

    async def _wait_for_crowd(self) -> None:
        if self.received["crowd"] == self.crowd_size:
            self._crowded.set()
        await self._crowded.wait()

    async def _respond(self, path: str, model: str, num_texts: int) -> Response:
        if model.isdigit():
            return JSONResponse({"error": "as told"}, status_code=int(model))
        if model == "garbage":
            return Response("data: not JSON\n\n")
        if model == "cut":
            # uvicorn closes the connection on an answer that is shorter than it said.
            return Response(b"{", headers={"content-length": "100"})
        if path == "/v1/completions":
            return StreamingResponse(self._stream(model), media_type="text/event-stream")
        await asyncio.sleep(_delay(model))
        data = [] if model == "empty" else [ANSWERS[path]] * num_texts
        return JSONResponse({"data": data}, headers=TIMES.get(model))

    async def _stream(self, model: str) -> AsyncIterator[str]:
        for piece in PIECES:
            await asyncio.sleep(_delay(model))
            yield f"data: {json.dumps({'choices': [{'text': piece}]})}\n\n"
        yield f"data: {json.dumps({'choices': [{'text': '', 'finish_reason': 'length'}]})}\n\n"
        if model != "empty":
            yield "data: [DONE]\n\n"


def _delay(model: str) -> float:
    return int(model.removesuffix("ms")) / 1e3 if model.endswith("ms") else 0.0


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextmanager
def running(stub: Stub) -> Iterator[str]:
    """Serve the stub in a thread; yields its URL."""
    config = uvicorn.Config(stub.app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
    server = _Server(config)
    thread = Thread(target=lambda: asyncio.run(server.serve()), name="stub")
    thread.start()
    assert server.listening.wait(60)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
