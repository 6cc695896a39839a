"""vLLM's routes beside those of OpenAI: classification, tokenization and the version."""

from __future__ import annotations

import time
from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.auth.caller import Caller
from server.deps import EngineDep, Target, classifier, classifiers, find_target, only
from server.engine import Engine
from server.generation_schemas import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
    TokenizeTextRequest,
)
from server.routes.access import OPEN, Infer
from server.routes.prompts import run_prompts
from server.routes.vllm_errors import VLLM_ERRORS
from server.schemas import VllmClassifyRequest
from server.sequence import Sequence
from server.tokenization import Tokenization

NAMING = "in the field model"
"""How its clients name a model."""

router = APIRouter(tags=["vllm"], **VLLM_ERRORS)


class VllmClassification(BaseModel):
    """The answer for one input."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class VllmUsage(BaseModel):
    """Counts of tokens, special ones included."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class VllmClassifyResponse(BaseModel):
    """vLLM's answer, without the additions of `/v1/classify`."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[VllmClassification]
    usage: VllmUsage


class Tokens(BaseModel):
    """The tokens of a prompt, and their texts where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text of tokens, special ones included."""

    prompt: str


class Version(BaseModel):
    """Of this service."""

    version: str


@router.post("/classify")
async def classify(
    body: VllmClassifyRequest, request: Request, response: Response, engine: EngineDep, caller: Infer
) -> VllmClassifyResponse:
    """Classify one or more texts. With `use_activation` false, `probs` are logits."""
    target = classifier(engine, caller, body.model or only(classifiers(engine, caller), NAMING))
    sequences = await run_prompts(
        engine,
        target,
        body.inputs,
        request,
        response,
        truncate=body.truncate_prompt_tokens is not None,
        priority=body.priority,
    )
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    return VllmClassifyResponse(
        id=f"classify-{request.state.request_id}",
        created=int(time.time()),
        model=target.name,
        data=[_classification(sequence, raw=body.use_activation is False) for sequence in sequences],
        usage=VllmUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, engine: EngineDep, caller: Infer) -> Tokens:
    """The tokens of a text, or of a conversation in its chat template."""
    tokenization = _target(engine, caller, body.model).base.tokenization
    return await engine.in_pool(request.state.deadline, _tokens, tokenization, body)


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, request: Request, engine: EngineDep, caller: Infer
) -> Detokenized:
    """The text of tokens."""
    tokenization = _target(engine, caller, body.model).base.tokenization
    tokenization.check_vocabulary(body.tokens, "tokens")
    prompt = await engine.in_pool(request.state.deadline, tokenization.decode, body.tokens, special=True)
    return Detokenized(prompt=prompt)


@router.get("/version", dependencies=[OPEN])
async def show_version() -> Version:
    """The version of this service."""
    return Version(version=version("molex-serve"))


def _target(engine: Engine, caller: Caller, model: str | None) -> Target:
    return find_target(engine, caller, model or only(list(engine.bases), NAMING))


def _classification(sequence: Sequence, *, raw: bool) -> VllmClassification:
    return VllmClassification(
        index=sequence.index,
        label=sequence.label,
        probs=sequence.scores if raw else sequence.probs,
        num_classes=len(sequence.probs),
    )


def _tokens(tokenization: Tokenization, body: TokenizeTextRequest | TokenizeChatRequest) -> Tokens:
    if isinstance(body, TokenizeTextRequest):
        ids = tokenization.token_ids(body.prompt, special=body.add_special_tokens)
    else:
        ids = tokenization.chat_ids(body.conversation, **body.template_options)
    return Tokens(
        count=len(ids),
        max_model_len=tokenization.max_length,
        tokens=ids,
        token_strs=tokenization.token_names(ids) if body.return_token_strs else None,
    )
