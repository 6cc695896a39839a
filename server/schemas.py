"""Bodies of requests. Every number, text and list has a maximum; a parameter that is not listed is refused.

OpenAI's parameters that this service does not implement are accepted only with the value that changes
nothing, because clients send them unasked.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from server.catalogue.records import Scope
from server.settings import ALIAS_PATTERN, FULL_NAME_PATTERN, MAX_ALIAS, MAX_FULL_NAME, MAX_INPUTS

MAX_TEXT = 4_194_304
"""Characters. More than that is no prompt: the longest sequence has a million tokens."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]
"""JSON can spell half of a surrogate pair, which pydantic refuses wherever it measures a length."""
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
User = Annotated[str, Field(max_length=512)]
"""For the records of the caller: nothing here depends on it."""
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
AdapterName = Annotated[str, Field(pattern=FULL_NAME_PATTERN, max_length=MAX_FULL_NAME)]
Source = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
"""As in vLLM, lower is earlier; here among what waits of the same tenant."""
Pair = Annotated[list[Text], Field(min_length=2, max_length=2)]


class Body(BaseModel):
    """A request body: nothing unknown, nothing converted, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ClassifyRequest(Body):
    """`POST /v1/classify`. A pair of texts, `[text, text_pair]`, is one input."""

    model: ModelName
    input: Text | Annotated[list[Text | Pair], Field(min_length=1, max_length=MAX_INPUTS)]
    return_routes: bool = False
    priority: Priority = 0
    user: User | None = None

    @property
    def inputs(self) -> list[str | list[str]]:
        return [self.input] if isinstance(self.input, str) else self.input


class VllmClassifyRequest(Body):
    """`POST /classify` of vLLM. `truncate_prompt_tokens` −1 cuts texts to the longest sequence."""

    model: ModelName | None = None
    input: Text | Texts
    use_activation: bool | None = None
    truncate_prompt_tokens: Literal[-1] | None = None
    priority: Priority = 0
    user: User | None = None

    add_special_tokens: Literal[True] = True

    @property
    def inputs(self) -> list[str | list[str]]:
        return [self.input] if isinstance(self.input, str) else list(self.input)


class TeiPredictRequest(Body):
    """`POST /predict` of text-embeddings-inference: `"text"`, `["text", "text_pair"]` or `[["text"], …]`.

    Empty lists get as far as the handler, which refuses them in TEI's own way, as it does empty texts.
    """

    inputs: (
        Text
        | Annotated[list[Text], Field(max_length=2)]
        | Annotated[list[Annotated[list[Text], Field(max_length=2)]], Field(max_length=MAX_INPUTS)]
    )
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right"] | None = None
    raw_scores: bool = False

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and any(isinstance(entry, list) for entry in self.inputs)

    @property
    def batch(self) -> list[str | list[str]]:
        """Each text, or pair of texts."""
        entries = cast(list[str | list[str]], self.inputs if self.is_batch else [self.inputs])
        return [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in entries]


class TeiEmbedRequest(Body):
    """`POST /embed` of text-embeddings-inference."""

    inputs: Text | Annotated[list[Text], Field(max_length=MAX_INPUTS)]
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
    input: Text | Texts
    encoding_format: Literal["float", "base64"] = "float"
    priority: Priority = 0
    user: User | None = None

    dimensions: None = None

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


AliasName = Annotated[str, Field(pattern=ALIAS_PATTERN, max_length=MAX_ALIAS)]
VersionNumber = Annotated[int, Field(ge=1, le=2**53)]


class PutAdapterRequest(Body):
    """`PUT /v1/adapters/{name}`. `base` is found if left out.

    `source` is a folder under the adapter root, by its path or as `file://…`, or what the operator allows of
    `hf://ORG/REPO@REVISION` and of object stores (`s3://BUCKET/PREFIX`). `pinned`: once in memory, the
    adapter is not evicted.
    """

    source: Source
    base: ModelName | None = None
    pinned: bool = False


class UploadFields(Body):
    """What may stand beside the files of `PUT /v1/adapters/{name}`, as text."""

    base: ModelName | None = None
    pinned: Literal["true", "false"] = "false"


class RollbackRequest(Body):
    """`POST /v1/adapters/{name}/rollback`. A number or an alias; by default the version before."""

    version: VersionNumber | AliasName | None = None


class AliasRequest(Body):
    """`PUT /v1/adapters/{name}/aliases/{alias}`. A number, or another alias, which is not followed later."""

    version: VersionNumber | AliasName


class LoadLoraRequest(Body):
    """`POST /v1/load_lora_adapter`, as in vLLM."""

    lora_name: AdapterName
    lora_path: Source
    base_model_name: ModelName | None = None
    load_inplace: bool = False

    is_3d_lora_weight: Literal[False] | None = None


class UnloadLoraRequest(Body):
    """`POST /v1/unload_lora_adapter`, as in vLLM. There are no numbers of adapters here."""

    lora_name: AdapterName

    lora_int_id: None = None


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
