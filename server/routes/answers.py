"""The answers that handlers spell themselves, as the OpenAPI document shows them.

tests/server/routes/test_answers.py holds the answers to these models.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.errors import ErrorKind


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """`param` names the field at fault, if there is one."""

    message: str
    type: str
    param: str | None
    code: Annotated[str, Field(json_schema_extra={"enum": [kind.code for kind in ErrorKind]})]


class ErrorAnswer(Answer):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class VllmErrorDetail(Answer):
    """`code` is the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class VllmError(Answer):
    """An error in the shape of vLLM."""

    error: VllmErrorDetail


class TeiError(Answer):
    """An error in the shape of text-embeddings-inference."""

    error: str
    error_type: Literal["Backend", "Empty", "Overloaded", "Unhealthy", "Validation"]


class V2Error(Answer):
    """An error in the shape of the Open Inference Protocol."""

    error: str


Route = list[int | list[int]]
"""The layer that each mixed depth chose, or two of them for top-2."""


class PromptTokens(Answer):
    """`cached_tokens` did not run: an earlier prompt began alike."""

    cached_tokens: int


class Usage(Answer):
    """Counts of tokens. The choices of a prompt share it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class CompletionLogprobs(Answer):
    """One entry a token; offsets are characters of the generated text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer):
    """`routes` where the request has `return_routes`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routes: Route | None = None


class Generated(Answer):
    """What all generated texts have, whole or in parts. The digest is null for a bare base."""

    id: str
    created: int
    model: str
    adapter_digest: str | None


class Completion(Generated):
    """OpenAI's text completion. Streamed, each event has this shape, and the last one is `[DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(Answer):
    """`bytes` is null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[ChatToken]


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str


class ChatPart(Answer):
    """What a choice of a chat has, whole or in parts."""

    index: int
    logprobs: ChatLogprobs | None
    routes: Route | None = None


class ChatChoice(ChatPart):
    """`routes` where the request has `return_routes`."""

    message: ChatMessage
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Generated):
    """OpenAI's chat completion. Streamed, each event is a ChatChunk, and the last one is `[DONE]`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Answer):
    """The role comes first, then the text piece by piece."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ChatPart):
    """`routes` at the end where the request has `return_routes`."""

    delta: ChatDelta
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(Generated):
    """A part of OpenAI's chat completion. `usage` where the request has `include_usage`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class BinaryParameters(Answer):
    binary_data_size: int


class InferOutput(Answer):
    """`data` in row-major order, or the number of bytes that follow the JSON."""

    name: str
    datatype: Literal["FP32", "BYTES"]
    shape: list[int]
    data: list[float] | list[str] | None = None
    parameters: BinaryParameters | None = None


class InferResponse(Answer):
    """The tensors that were asked for."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]
