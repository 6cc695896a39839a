"""What a request for text may say beside its model and prompt. The server checks the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class GenerationOptions(TypedDict, total=False):
    """Of completions and chat alike; what is left out has the server's default.

    `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `structured_outputs` are as in vLLM.
    `return_routes` asks for the layers that each mixed depth chose; of what waits of a tenant the lowest
    `priority` is first.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[str, float]
    n: int
    seed: int
    stop: str | Sequence[str]
    ignore_eos: bool
    stream_options: dict[str, bool]
    response_format: dict[str, Any]
    structured_outputs: dict[str, Any]
    return_routes: bool
    priority: int
    user: str


class CompletionOptions(GenerationOptions, total=False):
    """Of completions. `logprobs` is how many tokens to list in each place."""

    logprobs: int
    echo: bool


class ChatOptions(GenerationOptions, total=False):
    """Of chat. `top_logprobs` is how many tokens to list in each place, where `logprobs` is set."""

    logprobs: bool
    top_logprobs: int
    add_generation_prompt: bool
    continue_final_message: bool
