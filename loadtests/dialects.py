"""How servers are spoken to: each dialect builds a request and reads an answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx

DialectName = Literal[
    "molex-classify", "openai-completions", "openai-embeddings", "infinity-classify", "infinity-embeddings"
]


class BadAnswerError(Exception):
    """An answer with a good status that is not what the dialect promises."""


class Dialect(Protocol):
    """One kind of request."""

    @property
    def path(self) -> str:
        """Where it is posted to, under the URL of the arm."""

    def body(self, model: str, text: str) -> dict[str, Any]:
        """The JSON of a request."""

    async def read(self, response: httpx.Response) -> list[float]:
        """Read the answer to its end.

        Returns the moments, in seconds of `time.perf_counter`, at which pieces of text came; none if the
        answer is not streamed. Raises BadAnswerError.
        """


@dataclass(frozen=True)
class Results:
    """Texts in a list go in, a list with a result of each, under `data`, comes out."""

    path: str
    is_result: Callable[[Any], bool]
    num_texts: int = 1
    """How many lines of its text a request sends as texts of their own."""

    def body(self, model: str, text: str) -> dict[str, Any]:
        return {"model": model, "input": text.split("\n", self.num_texts - 1)}

    async def read(self, response: httpx.Response) -> list[float]:
        await response.aread()
        answer = _parse(response.content)
        results = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(results, list) or len(results) != self.num_texts:
            raise BadAnswerError("the answer has not a result of each text")
        if not all(map(self.is_result, results)):
            raise BadAnswerError("the answer has something else than results")
        return []


@dataclass(frozen=True)
class StreamedCompletion:
    """OpenAI's completions as server-sent events, greedy, so that all arms are asked for the same."""

    max_tokens: int
    path: str = "/v1/completions"

    def body(self, model: str, text: str) -> dict[str, Any]:
        sampling = {"max_tokens": self.max_tokens, "temperature": 0}
        return {"model": model, "prompt": text, "stream": True, **sampling}

    async def read(self, response: httpx.Response) -> list[float]:
        moments: list[float] = []
        done = False
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                done = True
            elif _text(_parse(data)):
                moments.append(time.perf_counter())
        if not done:
            raise BadAnswerError("the stream broke off")
        return moments


def _parse(content: str | bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise BadAnswerError("the answer is not JSON") from error


def _text(event: Any) -> str:
    """The text of one event, which may be empty: the last event carries a reason or counts instead."""
    try:
        return "".join(choice["text"] for choice in event["choices"])
    except (KeyError, TypeError) as error:
        raise BadAnswerError("the event is no completion") from error


def is_embedding(result: Any) -> bool:
    return isinstance(result, dict) and "embedding" in result


def make_dialect(name: DialectName, max_tokens: int | None) -> Dialect:
    """The dialect of a name. `max_tokens`: length of a completion; None for the others."""
    match name:
        case "molex-classify":
            return Results("/v1/classify", lambda result: isinstance(result, dict) and "probs" in result)
        case "infinity-classify":
            # A list of labels with their scores.
            return Results("/classify", lambda result: isinstance(result, list) and bool(result))
        case "infinity-embeddings":
            return Results("/embeddings", is_embedding)
        case "openai-embeddings":
            return Results("/v1/embeddings", is_embedding)
        case "openai-completions":
            assert max_tokens is not None
            return StreamedCompletion(max_tokens)
