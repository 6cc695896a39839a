"""What the server answers. Fields that a newer server adds are ignored."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Route = list[int | list[int]]
"""The layer that each mixed depth chose, or two of them for top-2."""
FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class PromptTokens(Answer):
    """`cached_tokens` did not run: an earlier prompt began alike."""

    cached_tokens: int


class Usage(Answer):
    """Counts of tokens. The choices of a prompt share it."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokens | None = None


class Classification(Answer):
    """Of one input; of a regression, `probs` holds its one number. `routes` where they were asked for."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    routes: Route | None = None


class Classifications(Answer):
    """One for each input, in order. `adapter_digest` says which weights answered."""

    id: str
    created: int
    model: str
    data: list[Classification]
    usage: Usage
    adapter_digest: str


class Embedding(Answer):
    """Of one input, of length 1."""

    index: int
    embedding: list[float]


class Embeddings(Answer):
    """One for each input, in order."""

    model: str
    data: list[Embedding]
    usage: Usage


class CompletionLogprobs(Answer):
    """One entry a token; offsets are characters of the generated text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer):
    """In a stream `text` is the next piece, and `finish_reason` comes with the last one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    routes: Route | None = None


class Completion(Answer):
    """Text after each prompt, or the next piece of it. `adapter_digest` is None for a bare base."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    adapter_digest: str | None
    usage: Usage | None = None


class TokenLogprob(Answer):
    """`bytes` is None for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TokenLogprob):
    """A token that was generated, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """One entry a token."""

    content: list[ChatToken]


class ChatMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Answer):
    """One of the answers to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    routes: Route | None = None


class ChatCompletion(Answer):
    """Answers to a conversation. `adapter_digest` is None for a bare base."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    adapter_digest: str | None
    usage: Usage


class ChatDelta(Answer):
    """The next piece of a message; the first one tells who speaks."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    """`finish_reason` comes with the last piece."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    routes: Route | None = None


class ChatChunk(Answer):
    """The next pieces of the answers to a conversation. `usage` comes last, where it was asked for."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    adapter_digest: str | None
    usage: Usage | None = None


class Model(Answer):
    """A base, or an adapter with its `parent` base. `task` is None for an encoder without an adapter."""

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int
    kind: str
    task: str | None
    digest: str


class ModelList(Answer):
    data: list[Model]


AdapterState = Literal["registered", "loading", "ready", "failed"]


class AdapterVersion(Answer):
    """One set of weights that an adapter's name has stood for; what is None is not known yet.

    `reason` says why its load failed. `created` and `updated` are seconds since the epoch.
    """

    version: int
    state: AdapterState
    reason: str | None
    digest: str | None
    base: str | None
    kind: str | None
    task: str | None
    labels: dict[int, str]
    bytes: int | None
    source: str
    pinned: bool
    created: int
    updated: int


class Adapter(Answer):
    """An adapter and its versions, oldest first.

    `state` and `reason` are those of the newest load; all else is of `version`, the current one, which is
    None while none is ready. `bytes` is what its weights take in memory; `resident` says whether they are
    there now. `aliases` are names of versions.
    """

    name: str
    state: AdapterState
    reason: str | None
    version: int | None
    base: str | None
    kind: str | None
    task: str | None
    digest: str | None
    rank: int | None
    labels: dict[int, str]
    mixed_depths: list[int]
    bytes: int | None
    resident: bool
    pinned: bool
    source: str | None
    created: int
    versions: list[AdapterVersion]
    aliases: dict[str, int]

    @property
    def settled(self) -> bool:
        """Whether the newest load has ended, well or badly."""
        return self.state in ("ready", "failed")


class AdapterList(Answer):
    data: list[Adapter]
