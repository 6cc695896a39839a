"""Every call, once: for the asynchronous client as it is, for the blocking one driven to its end at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from molex_client.answers import (
    Adapter,
    AdapterList,
    ChatChunk,
    ChatCompletion,
    Classifications,
    Completion,
    Embeddings,
    Model,
    ModelList,
)
from molex_client.errors import AdapterFailedError, ApiError, ClientError, failure, refusal
from molex_client.options import ChatOptions, CompletionOptions, Message
from molex_client.reading import parse, read_json
from molex_client.retries import Retries
from molex_client.streams import AsyncStream, EventReader
from molex_client.transports import Transport, timeouts

T = TypeVar("T", bound=BaseModel)
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""One text or several, or token ids of one or several."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LONGEST_WAIT = 300
"""Seconds that the server waits for a load before it answers."""
DEADLINE_HEADER = "x-request-timeout"
LONGEST_DEADLINE = 86_400
"""Seconds: the server takes no number above."""
FIRST_LOOK, RAREST_LOOK = 0.2, 5.0
"""Seconds between two looks at a load, which double from the first to the last of these."""


class Api:
    """The calls of a client.

    Each raises ClientError, whose subclasses say what went wrong, and ValueError for a name that is none.
    """

    def __init__(self, transport: Transport, retries: Retries, timeout: float) -> None:
        self._transport = transport
        self._retries = retries
        self._timeout = timeout

    async def classify(
        self, model: str, inputs: str | Sequence[str | tuple[str, str]], *, return_routes: bool = False
    ) -> Classifications:
        """Classify a text or several, or pairs of texts, with an adapter; `model` is its name.

        `return_routes` asks for the layers that each mixed depth chose.
        """
        body = {"model": model, "input": inputs, "return_routes": return_routes}
        return await self._run(Classifications, "/v1/classify", body)

    async def embed(self, model: str, inputs: str | Sequence[str]) -> Embeddings:
        """Embed a text or several with a bare encoder: vectors of length 1."""
        return await self._run(Embeddings, "/v1/embeddings", {"model": model, "input": inputs})

    async def complete(self, model: str, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue one or more prompts with an adapter or a bare decoder."""
        body = {"model": model, "prompt": prompt, **options}
        return await self._run(Completion, "/v1/completions", body)

    async def stream_completion(
        self, model: str, prompt: Prompt, **options: Unpack[CompletionOptions]
    ) -> AsyncStream[Completion]:
        """Continue one or more prompts; the text comes as it is made."""
        body = {"model": model, "prompt": prompt, **options}
        return await self._stream(Completion, "/v1/completions", body)

    async def chat(
        self, model: str, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> ChatCompletion:
        """Answer a conversation with an adapter or a bare decoder."""
        body = {"model": model, "messages": messages, **options}
        return await self._run(ChatCompletion, "/v1/chat/completions", body)

    async def stream_chat(
        self, model: str, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> AsyncStream[ChatChunk]:
        """Answer a conversation; the text comes as it is made."""
        body = {"model": model, "messages": messages, **options}
        return await self._stream(ChatChunk, "/v1/chat/completions", body)

    async def list_models(self) -> list[Model]:
        """The bases and adapters that this client may use."""
        return (await self._read(ModelList, "GET", "/v1/models")).data

    async def get_model(self, name: str) -> Model:
        """One base or adapter."""
        return await self._read(Model, "GET", f"/v1/models/{_part(name)}")

    async def list_adapters(self) -> list[Adapter]:
        """The adapters that this client may use, in detail."""
        return (await self._read(AdapterList, "GET", "/v1/adapters")).data

    async def get_adapter(self, name: str) -> Adapter:
        """One adapter with its versions."""
        return await self._read(Adapter, "GET", _adapter(name))

    async def push_adapter(
        self,
        name: str,
        folder: str | Path,
        *,
        base: str | None = None,
        pinned: bool = False,
        wait: float = LONGEST_WAIT,
    ) -> Adapter:
        """Upload the two files of an adapter folder as a new version, which serves once it is ready.

        The same files make no second version. The server finds the `base` that the adapter fits, if none is
        named; `pinned` keeps the weights in memory. Returns after `wait` seconds at most, 0 to 300: the load
        may go on then, which `state` tells. Raises ApiError where it has failed by then, and OSError where a
        file cannot be read.
        """
        files = {n: (n, await self._transport.read_file(Path(folder) / n)) for n in ADAPTER_FILES}
        fields = {"pinned": "true" if pinned else "false"} | ({} if base is None else {"base": base})
        return await self._put(name, wait, files=files, data=fields)

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        base: str | None = None,
        pinned: bool = False,
        wait: float = LONGEST_WAIT,
    ) -> Adapter:
        """Have the server fetch an adapter from a source that it allows; the rest is as in `push_adapter`.

        A source is a folder under the server's adapter root, or a URL: `file://`, `hf://`, `s3://`.
        """
        body = {"source": source, "pinned": pinned} | ({} if base is None else {"base": base})
        return await self._put(name, wait, json=body)

    async def wait_for_adapter(self, name: str, seconds: float = LONGEST_WAIT) -> Adapter:
        """Wait until the newest load of an adapter has ended, for some seconds at most.

        Raises AdapterFailedError where it has failed or has not ended by then.
        """
        deadline, pause = time.monotonic() + seconds, FIRST_LOOK
        while not (adapter := await self.get_adapter(name)).settled:
            if time.monotonic() + pause > deadline:
                raise AdapterFailedError(name, f"is {adapter.state} after {seconds:g} seconds")
            await self._transport.sleep(pause)
            pause = min(2 * pause, RAREST_LOOK)
        if adapter.state == "failed":
            raise AdapterFailedError(name, f"failed to load: {adapter.reason}")
        return adapter

    async def rollback_adapter(self, name: str, version: int | str | None = None) -> Adapter:
        """Make an earlier version the current one: a number or an alias, or else the one before."""
        body = {} if version is None else {"version": version}
        repeatable = version is not None
        return await self._read(
            Adapter, "POST", f"{_adapter(name)}/rollback", json=body, repeatable=repeatable
        )

    async def set_alias(self, name: str, alias: str, version: int | str) -> Adapter:
        """Let `name@alias` mean a version: a number, or what another alias means now."""
        path = f"{_adapter(name)}/aliases/{_part(alias)}"
        return await self._read(Adapter, "PUT", path, json={"version": version})

    async def remove_alias(self, name: str, alias: str) -> None:
        """Remove a name of a version."""
        await self._send("DELETE", f"{_adapter(name)}/aliases/{_part(alias)}")

    async def remove_adapter(self, name: str) -> None:
        """Remove an adapter with all its versions; requests in flight finish."""
        await self._send("DELETE", _adapter(name))

    async def remove_version(self, name: str, version: int) -> None:
        """Remove a version that is neither the current one nor named by an alias."""
        await self._send("DELETE", f"{_adapter(name)}/versions/{version}")

    async def is_alive(self) -> bool:
        """Whether the process is sound; if not, it wants a restart."""
        return await self._probe("/livez")

    async def is_ready(self) -> bool:
        """Whether the server takes new requests."""
        return await self._probe("/readyz")

    async def _put(self, name: str, wait: float, **content: Any) -> Adapter:
        params, timeout = {"wait": wait}, timeouts(wait + self._timeout)
        return await self._read(Adapter, "PUT", _adapter(name), params=params, timeout=timeout, **content)

    async def _probe(self, path: str) -> bool:
        """Whether the answer is 200. 503 is an answer too; anything else is an error."""
        outcome = await self._attempt(self._transport.http.build_request("GET", path), stream=False)
        if isinstance(outcome, httpx.Response):
            return True
        if isinstance(outcome, ApiError) and outcome.status == 503:
            return False
        raise outcome

    async def _run(self, kind: type[T], path: str, body: Mapping[str, object]) -> T:
        """Have a model run. The server stops when this client gives up, even where a proxy lies between.

        A stream has no such limit: it may last as long as its pieces come in time.
        """
        headers = {DEADLINE_HEADER: str(min(self._timeout, LONGEST_DEADLINE))}
        return await self._read(kind, "POST", path, json=body, headers=headers)

    async def _read(self, kind: type[T], method: str, path: str, **content: Any) -> T:
        response = await self._send(method, path, **content)
        return parse(kind, read_json(response.content))

    async def _stream(self, kind: type[T], path: str, body: Mapping[str, object]) -> AsyncStream[T]:
        response = await self._send("POST", path, json={**body, "stream": True}, stream=True)
        return AsyncStream(response, EventReader(kind, response.headers.get("x-request-id")))

    async def _send(
        self,
        method: str,
        path: str,
        *,
        repeatable: bool = True,
        stream: bool = False,
        **content: Any,
    ) -> httpx.Response:
        """The response of a success. Raises ClientError, once another attempt is of no use."""
        request = self._transport.http.build_request(method, path, **content)
        made = 0
        while True:
            made += 1
            outcome = await self._attempt(request, stream=stream)
            if isinstance(outcome, httpx.Response):
                return outcome
            pause = self._retries.pause(outcome, made, repeatable=repeatable)
            if pause is None:
                raise outcome
            await self._transport.sleep(pause)

    async def _attempt(self, request: httpx.Request, *, stream: bool) -> httpx.Response | ClientError:
        try:
            response = await self._transport.send(request, stream=stream)
            if response.is_success:
                return response
            await self._transport.read(response)
        except httpx.HTTPError as error:
            return failure(error)
        return refusal(response)


def _adapter(name: str) -> str:
    return f"/v1/adapters/{_part(name)}"


def _part(name: str) -> str:
    """A name as a part of a path; one that would lead elsewhere is a ValueError."""
    if not all(step.strip(".") for step in name.split("/")):
        raise ValueError(f"{name!r} is no name")
    return quote(name, safe="/@")
