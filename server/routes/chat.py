"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from server.deps import EngineDep, generator
from server.detokenizer import REPLACEMENT
from server.generation_schemas import ChatRequest
from server.routes.access import Infer
from server.routes.answers import ChatChunk, ChatCompletion
from server.routes.generation import Choice, Generation, Json, documented_answers
from server.routes.prepare import prepare
from server.routes.timing import Stopwatch
from server.sequence import TokenText, Update

router = APIRouter(tags=["generation"])


class ChatShape:
    """OpenAI's chat completion."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": _logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> Json | None:
        return _delta(index, {"role": "assistant", "content": ""}, [], None)

    def delta(self, update: Update) -> Json:
        tokens = [] if update.token is None else [update.token]
        content = {"content": update.text} if update.text else {}
        return _delta(update.sequence.index, content, tokens, update.finish_reason)


# The response model is there for the OpenAPI document to define it: the handler spells its own answers.
@router.post(
    "/v1/chat/completions",
    response_class=Response,
    response_model=ChatChunk,
    responses=documented_answers(ChatCompletion, chunk=ChatChunk),
)
async def create_chat_completion(
    body: ChatRequest, request: Request, engine: EngineDep, caller: Infer
) -> Response:
    """Answer a conversation. With `stream` the answer is a stream of server-sent events."""
    watch = Stopwatch(request.state.deadline)
    target = generator(engine, caller, body.model)
    generation = Generation(body, target, ChatShape(), watch, engine, request)
    tokenization = target.base.tokenization
    encoding = engine.in_pool(
        watch.deadline,
        tokenization.encode_chat,
        body.conversation,
        reserve=body.limit or 1,
        **body.template_options,
    )
    adapter, prompt = await prepare(engine, target, watch, encoding)
    limit = body.limit or tokenization.max_length - len(prompt.token_ids)
    return await generation.respond(adapter, [prompt], body.num_logprobs, limit)


def _delta(index: int, delta: dict[str, str], tokens: list[TokenText], finish_reason: str | None) -> Json:
    return {
        "index": index,
        "delta": delta,
        "logprobs": _logprobs(tokens),
        "finish_reason": finish_reason,
    }


def _logprobs(tokens: list[TokenText]) -> Json | None:
    return {"content": [_token(token) for token in tokens]} if tokens else None


def _token(token: TokenText) -> Json:
    top = [_entry(text, logprob) for text, logprob in token.top]
    return _entry(token.text, token.logprob) | {"top_logprobs": top}


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    # Part of a character has no text of its own, and its bytes are not known here: null, as OpenAI allows.
    data = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data}
