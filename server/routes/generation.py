"""What completions and chat completions share: running sequences, collecting or streaming their text."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from molex.adapter import Adapter
from molex.routing import flat_route
from molex.sampling import SamplingParams
from server.deps import Target, check_count, spend_tokens, unless_disconnected
from server.engine import Engine
from server.errors import ServiceError
from server.generation_schemas import GenerationRequest
from server.grammar import GrammarConstraint
from server.routes.answers import Answer, ErrorAnswer
from server.routes.timing import Stopwatch
from server.sequence import Sequence, Timings, TokenText, Update
from server.submission import Submission
from server.tokenization import Prompt

log = logging.getLogger(__name__)
Json = dict[str, Any]


def documented_answers(whole: type[Answer], chunk: type[Answer]) -> dict[int | str, Json]:
    """How the OpenAPI document shows an answer: whole, or as server-sent events with chunks.

    The document has to define `chunk`. An error that comes after the first event is one too.
    """
    kinds = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (chunk, ErrorAnswer)]
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [json_text, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"model": whole, "content": {"text/event-stream": {"itemSchema": event}}}}


@dataclass
class Choice:
    """The generated text of one prompt."""

    index: int
    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.finish_reason = update.finish_reason
        if update.token is not None:
            self.tokens.append(update.token)


class Shape(Protocol):
    """How an endpoint spells what was generated."""

    id_prefix: str
    object: str
    chunk_object: str

    def choice(self, choice: Choice) -> Json:
        """A complete choice."""

    def opening(self, index: int) -> Json | None:
        """The first chunk of a choice, if the endpoint has one that says nothing yet."""

    def delta(self, update: Update) -> Json:
        """The choice in a chunk of a stream."""


@dataclass
class Generation:
    """One request for text on its way to an answer."""

    body: GenerationRequest
    target: Target
    shape: Shape
    watch: Stopwatch
    engine: Engine
    request: Request
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = self.shape.id_prefix + self.request.state.request_id
        self.created = int(time.time())

    async def respond(
        self, adapter: Adapter, prompts: Seq[Prompt], logprobs: int | None, limit: int
    ) -> Response:
        """Generate at most `limit` tokens after each prompt, as often as the request has choices.

        `adapter` holds the weights of the target. Choices of one prompt differ in their random numbers alone;
        they are neighbours in the answer.
        """
        self._check(len(prompts))
        constraint = await self._constraint()
        await spend_tokens(self.request, self.target.caller, [*prompts] * self.body.num_choices, limit)
        self.sequences = [
            Sequence(
                base=self.target.base.name,
                adapter=adapter,
                tenant=self.target.caller.tenant,
                priority=self.body.priority,
                token_ids=prompt.token_ids,
                sampling=sampling_params(self.body, limit, logprobs, choice),
                constraint=constraint and constraint.copy(),
                index=index * self.body.num_choices + choice,
                timings=Timings(self.watch.created),
            )
            for index, prompt in enumerate(prompts)
            for choice in range(self.body.num_choices)
        ]
        submission = self.engine.submit(self.sequences, self.watch.deadline)
        return await (self._stream(submission) if self.body.stream else self._answer(submission))

    def _check(self, num_prompts: int) -> None:
        """Raises ServiceError for what depends on the server: its limits and the base's vocabulary."""
        check_count(self.engine, num_prompts * self.body.num_choices, "n", "choices")
        self.target.base.tokenization.check_vocabulary(self.body.token_bias, "logit_bias")

    async def _constraint(self) -> GrammarConstraint | None:
        """Raises ServiceError where the grammar is not supported."""
        if (grammar := self.body.grammar) is None:
            return None
        compile_grammar = self.target.base.tokenization.grammars.compile
        return await self.engine.in_pool(self.watch.deadline, compile_grammar, grammar)

    async def _answer(self, submission: Submission) -> Response:
        try:
            updates = await unless_disconnected(self.request, submission.finished())
        finally:
            submission.cancel()
        choices = [Choice(sequence.index) for sequence in self.sequences]
        for update in updates:
            choices[update.sequence.index].add(update)
        spelled = [
            self.shape.choice(choice) | self._routes(sequence)
            for choice, sequence in zip(choices, self.sequences, strict=True)
        ]
        content = self._envelope(self.shape.object, spelled) | {"usage": self._usage()}
        headers = self.watch.record(self.request, self.engine, self.sequences)
        return JSONResponse(content, headers=self.target.headers | headers)

    async def _stream(self, submission: Submission) -> Response:
        """Answer once the first token is there: a request that fails before gets its proper status."""
        updates = submission.updates()
        try:
            first = await unless_disconnected(self.request, _next(updates))
        except BaseException:
            submission.cancel()
            raise
        return EventStream(
            self._events(first, updates), on_close=submission.cancel, headers=self.target.headers
        )

    async def _events(self, first: Update, updates: AsyncIterator[Update]) -> AsyncIterator[str]:
        for sequence in self.sequences:
            if opening := self.shape.opening(sequence.index):
                yield self._chunk([opening])
        try:
            if event := self._event(first):
                yield event
            async for update in updates:
                if event := self._event(update):
                    yield event
            if self.body.include_usage:
                yield self._chunk([], usage=self._usage())
        except ServiceError as error:
            yield _sse(error.body())
        self.watch.record(self.request, self.engine, self.sequences)
        yield "data: [DONE]\n\n"

    def _event(self, update: Update) -> str | None:
        """The chunk for an update; None where there is nothing to tell yet."""
        if not (update.text or update.token or update.last):
            return None
        routes = self._routes(update.sequence) if update.last else {}
        return self._chunk([self.shape.delta(update) | routes])

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> str:
        content = self._envelope(self.shape.chunk_object, choices)
        if self.body.include_usage:
            content["usage"] = usage
        return _sse(content)

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.target.name,
            "choices": choices,
            "adapter_digest": self.target.digest,
        }

    def _routes(self, sequence: Sequence) -> Json:
        return {"routes": flat_route(sequence.route or ())} if self.body.return_routes else {}

    def _usage(self) -> Json:
        # The choices of a prompt share it.
        prompts = self.sequences[:: self.body.num_choices]
        prompt = sum(len(sequence.token_ids) for sequence in prompts)
        completion = sum(len(sequence.output_ids) for sequence in self.sequences)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(sequence.num_reused for sequence in prompts)},
        }


def sampling_params(
    body: GenerationRequest, limit: int, logprobs: int | None, choice: int = 0
) -> SamplingParams:
    """OpenAI reads an explicit null as the default. Each choice of a seeded request has a seed of its own."""
    return SamplingParams(
        max_tokens=limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=body.token_bias,
        seed=None if body.seed is None else body.seed + choice,
        stop=body.stop_strings,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


class EventStream(StreamingResponse):
    """Server-sent events. `on_close` is called when the stream ends in whatever way."""

    def __init__(
        self, events: AsyncIterator[str], *, on_close: Callable[[], None], headers: dict[str, str]
    ) -> None:
        # Without this a proxy in front may hold tokens back.
        headers = headers | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _next(updates: AsyncIterator[Update]) -> Update:
    return await anext(updates)


def _sse(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
