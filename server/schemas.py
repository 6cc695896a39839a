"""Bodies of requests. Every number has a maximum, and a parameter that is not listed is refused by name.

OpenAI's parameters that this service does not implement are accepted only with the value that changes
nothing, because clients send them unasked.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from server.catalogue.records import Scope
from server.settings import FULL_NAME_PATTERN

MAX_SEED = 2**63 - 1
MAX_TOKENS = 1_048_576
MAX_LOGPROBS = 20


def _unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text has a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
ModelName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_unicode)]
AdapterName = Annotated[str, Field(pattern=FULL_NAME_PATTERN)]
Source = Annotated[
    str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$"), AfterValidator(_unicode)
]
StopString = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_unicode)]
One = Annotated[int, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Pair = Annotated[list[Text], Field(min_length=2, max_length=2)]


class Body(BaseModel):
    """A request body: nothing unknown, nothing converted, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ClassifyRequest(Body):
    """`POST /v1/classify`. A pair of texts, `[text, text_pair]`, is one input."""

    model: ModelName
    input: Text | Annotated[list[Text | Pair], Field(min_length=1)]
    return_routes: bool = False
    user: Text | None = None

    @property
    def inputs(self) -> list[str | list[str]]:
        return [self.input] if isinstance(self.input, str) else self.input


class TeiPredictRequest(Body):
    """`POST /predict` of text-embeddings-inference: `"text"`, `["text", "text_pair"]` or `[["text"], …]`."""

    inputs: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=2)]
        | Annotated[list[Annotated[list[Text], Field(min_length=1, max_length=2)]], Field(min_length=1)]
    )
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] | None = None
    raw_scores: bool = False

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and isinstance(self.inputs[0], list)

    @property
    def batch(self) -> list[str | list[str]]:
        """Each text, or pair of texts."""
        entries = cast(list[str | list[str]], self.inputs if self.is_batch else [self.inputs])
        return [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in entries]


class TeiEmbedRequest(Body):
    """`POST /embed` of text-embeddings-inference."""

    inputs: Text | Annotated[list[Text], Field(min_length=1)]
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] | None = None
    normalize: bool = True

    prompt_name: None = None
    dimensions: None = None

    @property
    def batch(self) -> list[str | list[str]]:
        return [self.inputs] if isinstance(self.inputs, str) else list(self.inputs)


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`. Token ids are refused: a client's are not those of this server's tokenizers."""

    model: ModelName
    input: Text | Annotated[list[Text], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    user: Text | None = None

    dimensions: None = None

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class StreamOptions(Body):
    include_usage: bool = False


class GenerationRequest(Body):
    """What `/v1/completions` and `/v1/chat/completions` have in common.

    `top_k`, `ignore_eos` (both as in vLLM) and `return_routes` are extensions of OpenAI's API. `user` is
    for the caller's own records.
    """

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_routes: bool = False
    user: Text | None = None

    n: One | None = 1
    presence_penalty: Zero | None = 0.0
    frequency_penalty: Zero | None = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. A prompt is a text or a list of token ids; several make several choices."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    best_of: One | None = 1
    echo: Literal[False] | None = False
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [entry for entry in self.prompt if isinstance(entry, int)]
        prompts = [entry for entry in self.prompt if isinstance(entry, str | list)]
        return [tokens] if tokens else [*prompts]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`. `max_completion_tokens` is the newer name of `max_tokens`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    response_format: TextFormat | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs")
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            raise ValueError("max_completion_tokens and max_tokens are the same: give one")
        return self


class PutAdapterRequest(Body):
    """`PUT /v1/adapters/{name}`. `source` is a folder under the adapter root; `base` is found if left out."""

    source: Source
    base: ModelName | None = None


class LoadLoraRequest(Body):
    """`POST /v1/load_lora_adapter`, as in vLLM."""

    lora_name: AdapterName
    lora_path: Source
    base_model_name: ModelName | None = None
    load_inplace: bool = False


class UnloadLoraRequest(Body):
    """`POST /v1/unload_lora_adapter`, as in vLLM."""

    lora_name: AdapterName


Limit = Annotated[int, Field(ge=0, le=2**53)] | None
Label = Annotated[str, Field(min_length=1, max_length=64)]


class PutTenantRequest(Body):
    """`PUT /v1/tenants/{name}`. null lifts a limit; what is left out stays."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    concurrency: Limit = None
    adapters: Limit = None
    adapter_bytes: Limit = None


class CreateKeyRequest(Body):
    """`POST /v1/keys`. `expires` is in seconds since the epoch."""

    tenant: Label
    name: Label = "default"
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1, max_length=16)]
    expires: Annotated[int, Field(ge=0, le=2**53)] | None = None
