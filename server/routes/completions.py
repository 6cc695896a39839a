"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.deps import EngineDep, check_count, generator
from server.routes.access import Infer
from server.routes.generation import Choice, Generation, Json
from server.routes.timing import Stopwatch
from server.schemas import CompletionRequest
from server.sequence import TokenText, Update
from server.tokenization import Prompt, Tokenization

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

router = APIRouter(tags=["generation"])


class CompletionShape:
    """OpenAI's text completion."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, choice: Choice) -> Json:
        return _choice(choice.index, choice.text, choice.tokens, choice.finish_reason)

    def opening(self, index: int) -> Json | None:
        """None: a text completion starts with its first text."""

    def delta(self, update: Update) -> Json:
        tokens = [] if update.token is None else [update.token]
        return _choice(update.sequence.index, update.text, tokens, update.finish_reason)


@router.post("/v1/completions", response_class=Response)
async def create_completion(
    body: CompletionRequest, request: Request, engine: EngineDep, caller: Infer
) -> Response:
    """Continue one or more prompts. With `stream` the answer is a stream of server-sent events."""
    watch = Stopwatch()
    check_count(engine, len(body.prompts), "prompt")
    target = generator(engine, caller, body.model)
    generation = Generation(body, target, CompletionShape(), watch, engine, request)
    limit = body.max_tokens or DEFAULT_MAX_TOKENS
    prompts = await engine.in_pool(_encode, target.base.tokenization, body.prompts, limit)
    return await generation.respond(prompts, body.logprobs, limit)


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
