"""Bodies of requests for text, and of those that tokenize it, by the rules of server/schemas.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from server.grammar import GrammarRequest
from server.schemas import Body, ModelName, Priority, Text, Texts, User
from server.settings import MAX_INPUTS

MAX_SEED = 2**63 - 1
MAX_TOKENS = 1_048_576
MAX_LOGPROBS = 20
MAX_CHOICES = 128

StopString = Annotated[Text, Field(min_length=1, max_length=256)]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
"""A token id as a key of a JSON object."""
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
Schema = Annotated[dict[str, Any], Field(max_length=1024)]
"""A JSON schema. What is in it, and how long it may be, is for `GrammarCompiler`."""


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    """A schema in OpenAI's wrapping. `strict` changes nothing: text always follows the schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", max_length=64)]
    description: Text | None = None
    json_schema: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema")
        return self

    @property
    def grammar(self) -> GrammarRequest | None:
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.json_schema
        return GrammarRequest("json_schema", schema, "response_format")


class StructuredOutputs(Body):
    """vLLM's field: one of a JSON schema, any JSON object, a regular expression, a list of texts."""

    json_schema: Annotated[Schema | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: Annotated[Text, Field(min_length=1)] | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len([name for name in self.model_fields_set if getattr(self, name) is not None]) != 1:
            raise ValueError("give one of json, json_object, regex and choice")
        return self

    @property
    def grammar(self) -> GrammarRequest:
        param = "structured_outputs"
        if self.regex is not None:
            return GrammarRequest("regex", self.regex, param)
        if self.choice is not None:
            return GrammarRequest("choice", self.choice, param)
        schema = {"type": "object"} if self.json_schema is None else self.json_schema
        return GrammarRequest("json_schema", schema, param)


class GenerationRequest(Body):
    """What `/v1/completions` and `/v1/chat/completions` have in common.

    `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`, `structured_outputs`, `priority` (as in vLLM) and
    `return_routes` are extensions of OpenAI's API. `user` is for the caller's own records.
    """

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = 1.0
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    n: Choices | None = 1
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_routes: bool = False
    priority: Priority = 0
    user: User | None = None

    @property
    def grammar(self) -> GrammarRequest | None:
        """What the text has to follow, if anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.grammar
        return None if self.response_format is None else self.response_format.grammar

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return self.n or 1

    @property
    def token_bias(self) -> dict[int, float]:
        return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream")
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("response_format and structured_outputs say the same: give one")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. A prompt is a text or a list of token ids; several make several choices."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    echo: bool | None = False

    best_of: Choices | None = None
    suffix: Literal[""] | None = None

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and best_of != (info.data.get("n") or 1):
            raise ValueError("only the value of n is supported")
        return best_of

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo is not supported together with logprobs")
        return self

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
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Conversation(Body):
    """Messages and how a chat template ends them: with the start of an answer, or open, as in vLLM."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.text} for message in self.messages]

    @property
    def template_options(self) -> dict[str, bool]:
        return {
            "add_generation_prompt": self.add_generation_prompt and not self.continue_final_message,
            "continue_final_message": self.continue_final_message,
        }

    @model_validator(mode="after")
    def _check_ending(self) -> Self:
        both = self.continue_final_message and self.add_generation_prompt
        if both and "add_generation_prompt" in self.model_fields_set:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        return self


class TokenizeTextRequest(Body):
    """`POST /tokenize` of vLLM, for a text."""

    model: ModelName | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(Conversation):
    """`POST /tokenize` of vLLM, for a conversation."""

    model: ModelName | None = None
    return_token_strs: bool | None = False

    add_special_tokens: Literal[False] = False


def _tokenized(body: object) -> str:
    """What a body wants tokenized. The names are no identifiers, so that errors leave them out."""
    return "a conversation" if isinstance(body, dict) and "messages" in body else "a text"


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("a text")] | Annotated[TokenizeChatRequest, Tag("a conversation")],
    Discriminator(_tokenized),
]


class DetokenizeRequest(Body):
    """`POST /detokenize` of vLLM."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


class ChatRequest(GenerationRequest, Conversation):
    """`POST /v1/chat/completions`. `max_completion_tokens` is the newer name of `max_tokens`."""

    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

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
