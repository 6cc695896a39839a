"""`POST /v1/completions`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response

from server.deps import EngineDep, check_count, generator
from server.generation_schemas import CompletionRequest
from server.routes.access import Infer
from server.routes.answers import Completion
from server.routes.generation import Choice, Generation, Json, documented_answers
from server.routes.prepare import prepare
from server.routes.timing import Stopwatch
from server.sequence import TokenText, Update
from server.tokenization import Prompt, Tokenization

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

router = APIRouter(tags=["generation"])


@dataclass
class CompletionShape:
    """OpenAI's text completion. `echoes` are the texts that choices begin with, if any: their prompts."""

    echoes: list[str] = field(default_factory=list)

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, choice: Choice) -> Json:
        text = self._echo(choice.index) + choice.text
        return _choice(choice.index, text, choice.tokens, choice.finish_reason)

    def opening(self, index: int) -> Json | None:
        """The prompt, where it is echoed: otherwise a text completion starts with its first text."""
        return _choice(index, self._echo(index), [], None) if self.echoes else None

    def delta(self, update: Update) -> Json:
        tokens = [] if update.token is None else [update.token]
        return _choice(update.sequence.index, update.text, tokens, update.finish_reason)

    def _echo(self, index: int) -> str:
        return self.echoes[index] if self.echoes else ""


@router.post(
    "/v1/completions", response_class=Response, responses=documented_answers(Completion, chunk=Completion)
)
async def create_completion(
    body: CompletionRequest, request: Request, engine: EngineDep, caller: Infer
) -> Response:
    """Continue one or more prompts. With `stream` the answer is a stream of server-sent events."""
    watch = Stopwatch(request.state.deadline)
    check_count(engine, len(body.prompts), "prompt")
    target = generator(engine, caller, body.model)
    limit = body.max_tokens or DEFAULT_MAX_TOKENS
    tokenization = target.base.tokenization
    encoding = engine.in_pool(watch.deadline, _encode, tokenization, body.prompts, limit)
    adapter, prompts = await prepare(engine, target, watch, encoding)
    echoes = await engine.in_pool(watch.deadline, _echoes, tokenization, body) if body.echo else []
    generation = Generation(body, target, CompletionShape(echoes), watch, engine, request)
    return await generation.respond(adapter, prompts, body.logprobs, limit)


def _echoes(tokenization: Tokenization, body: CompletionRequest) -> list[str]:
    """The prompt of each choice as text."""
    texts = (prompt if isinstance(prompt, str) else tokenization.decode(prompt) for prompt in body.prompts)
    return [text for text in texts for _ in range(body.num_choices)]


def _encode(tokenization: Tokenization, prompts: list[str | list[int]], limit: int) -> list[Prompt]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        return tokenization.encode(texts, "prompt", reserve=limit)
    token_lists = [prompt for prompt in prompts if not isinstance(prompt, str)]
    for token_ids in token_lists:
        tokenization.check(token_ids, "prompt", reserve=limit)
    return [Prompt(token_ids) for token_ids in token_lists]


def _choice(index: int, text: str, tokens: list[TokenText], finish_reason: str | None) -> Json:
    logprobs = _logprobs(tokens) if tokens else None
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(tokens: list[TokenText]) -> Json:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }
