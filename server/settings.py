"""Every setting of the service, spelled once: `molex serve` makes its options from this class.

A setting comes from the command line, else from the environment (`MOLEX_PORT=9000`), else from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.catalogue.url import URL, parse_url

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""Names of bases and adapters: safe in a URL, a file name and a metric label."""
FULL_NAME_PATTERN = r"^([a-z0-9][a-z0-9._-]{0,62}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""Names of adapters, with or without their tenant."""
MAX_FULL_NAME = 192
MIN_PEPPER = 32
MAX_PORT = 65_535
MAX_INPUTS = 4096
"""What `max_inputs` may be set to at most."""
MAX_REQUEST_SECONDS = 86_400
"""What `max_request_seconds` may be set to at most."""
MAX_ALIAS = 63
ALIAS_PATTERN = r"^[A-Za-z][A-Za-z0-9._-]{0,62}$"
"""Names of versions: never the same as a number."""

SOURCE_PATTERN = r"^(hf|s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._=/{}@-]*$"
"""Prefixes of what may be fetched. A store cannot be named whole, nor may a web server."""


class CatalogueSettings(BaseSettings):
    """What every command needs to reach the catalogue."""

    model_config = SettingsConfigDict(env_prefix="MOLEX_", extra="forbid", frozen=True)

    database: str | None = Field(
        None,
        description="URL of the catalogue of tenants and API keys: sqlite:///FILE or "
        "postgresql://USER@HOST/NAME. With it every caller needs a key; without it there are no keys.",
    )
    pepper: SecretStr | None = Field(
        None,
        description=f"Secret under which API keys are hashed, at least {MIN_PEPPER} characters. Needed with "
        "--database; read from the environment alone, since others can see a command line.",
        json_schema_extra={"environment_only": True},
    )

    @field_validator("pepper")
    @classmethod
    def _check_pepper_length(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value) < MIN_PEPPER:
            raise ValueError(f"MOLEX_PEPPER is too short: set it to at least {MIN_PEPPER} characters")
        return value

    @field_validator("database")
    @classmethod
    def _check_database(cls, value: str | None) -> str | None:
        if value is not None:
            parse_url(value)
        return value

    @model_validator(mode="after")
    def _check_pepper(self) -> Self:
        if self.database is not None and self.pepper is None:
            message = f"a catalogue needs a pepper: set MOLEX_PEPPER to at least {MIN_PEPPER} characters"
            raise ValueError(message)
        return self

    @property
    def catalogue(self) -> tuple[URL, str] | None:
        """Where the catalogue is, and its pepper; None where there is no catalogue."""
        if self.database is None or self.pepper is None:
            return None
        return parse_url(self.database), self.pepper.get_secret_value()


class Settings(CatalogueSettings):
    """Settings of one server process."""

    bases: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict,
        description="Base model: NAME=FOLDER, or a folder or hub id alone, named by its last part. "
        "Repeatable; separated by commas in MOLEX_BASES.",
        json_schema_extra={"flag": "--base"},
    )
    adapters: Path | None = Field(None, description="Folder whose subfolders are adapters to load.")
    adapter_root: Path | None = Field(
        None, description="Folder that HTTP callers may load adapters from. Default: --adapters."
    )
    storage: Path | None = Field(
        None,
        description="Folder for private copies of adapters that come over HTTP; no two servers share one. "
        "Without it they last as long as the process.",
    )
    sources: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Where adapters may be fetched from over HTTP, a prefix such as hf://ORG/ or "
        "s3://BUCKET/{tenant}/, in which {tenant} is the tenant that asks. Default: nowhere. Repeatable; "
        "separated by commas in MOLEX_SOURCES.",
        json_schema_extra={"flag": "--source"},
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=MAX_PORT, description="Port to listen on; 0 takes a free one.")
    admin_host: str = Field("127.0.0.1", description="Address of the second listener.")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=MAX_PORT,
        validate_default=True,
        description="Port of a second listener, where alone metrics, changes of adapters and administration "
        "are. Default: the one after --port where --host is beyond this machine, else none. The same as "
        "--port: one listener for all.",
    )
    insecure: bool = Field(False, description="Listen beyond this machine although no caller needs a key.")
    device: str = Field(
        "cpu",
        description="What runs the base models: cpu, or cuda for an NVIDIA GPU, cuda:1 for the second.",
    )
    backend: Literal["auto", "torch", "kernels", "onnx"] = Field(
        "auto",
        description="What runs the layers. kernels: this project's own, which need an x86-64 CPU with AVX2 "
        "and, at the first start, a C++ compiler; onnx: ONNX Runtime, on any CPU, if it is installed; torch: "
        "PyTorch, layer by layer; auto: kernels where they can, elsewhere the faster of ONNX Runtime and "
        "PyTorch, measured at start; on a GPU PyTorch, with the layers of a depth together.",
    )
    precision: Literal["auto", "fp32", "bf16", "int8", "int4", "fp64", "mixed"] = Field(
        "fp32",
        description="Precision of the base models. int8, int4: weights of layers in so many bits, all else "
        "in bf16 where the CPU has instructions for it and the backend uses them; mixed: fp32 with routed "
        "layers in bf16; auto: bf16 or else fp32, and of an exported base what it was exported in.",
    )
    routed_precision: Literal["fp32", "bf16", "int8", "int4", "fp64"] | None = Field(
        None,
        description="Precision of routed layers alone; int8, int4: weights in so many bits. Default: that of "
        "the others.",
    )
    max_batch_tokens: int = Field(2048, ge=1, le=1_048_576, description="Token budget of one forward pass.")
    max_tenant_tokens: int = Field(
        128,
        ge=1,
        le=1_048_576,
        description="Tokens of prompts that one tenant may take of a forward pass, or one longer prompt; a "
        "quarter of them beside tenants that ask for little. Others wait for the pass that runs: less makes "
        "their waits shorter, more makes full batches of one tenant faster. Without keys there is no such "
        "bound.",
    )
    max_sequences: int = Field(16, ge=1, le=1024, description="Generations that run at a time, per base.")
    max_cache_tokens: int = Field(
        32_768,
        ge=16,
        le=1_073_741_824,
        description="Tokens whose keys and values are kept, per base; MoLEx keeps a token twice, "
        "with top-2 three times.",
    )
    prefix_reuse: Literal["on", "off"] = Field(
        "on",
        description="Whether the keys and values of equal beginnings of prompts are used again.",
    )
    max_queue: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="Waiting sequences per base and tenant; beyond it callers get 429.",
    )
    max_length: int = Field(
        2048, ge=2, le=1_048_576, description="Longest sequence in tokens, where the base allows it."
    )
    max_inputs: int = Field(256, ge=1, le=MAX_INPUTS, description="Texts or prompts in one request.")
    max_body_bytes: int = Field(4_194_304, ge=1024, le=1_073_741_824, description="Largest request body.")
    max_adapter_bytes: int = Field(
        268_435_456,
        ge=1024,
        le=2**40,
        description="Largest file of an adapter that is uploaded, copied or fetched.",
    )
    max_storage_bytes: int = Field(
        17_179_869_184,
        ge=1024,
        le=2**50,
        description="Disk space for copies of adapters; the least recently used of those that can be fetched "
        "again go.",
    )
    max_adapters: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Versions of adapters registered at a time, in memory or not.",
    )
    max_resident_adapters: int = Field(
        1024, ge=1, le=1_000_000, description="Adapters in memory at a time; the least popular go."
    )
    max_resident_bytes: int = Field(
        4_294_967_296, ge=1, le=2**50, description="Memory for the weights of adapters."
    )
    max_bank_bytes: int = Field(
        67_108_864,
        ge=0,
        le=2**50,
        description="Memory for low-rank factors side by side, per base, where PyTorch's modules run the "
        "layers; all of it is taken when the first adapter runs. The kernels and a GPU in bf16 need none.",
    )
    pool_threads: int = Field(
        4, ge=1, le=256, description="Threads that tokenize, and as many that read adapters."
    )
    max_client_seconds: float = Field(
        30,
        ge=1,
        le=3600,
        description="Time that a client has to send headers, to send a body (408 for either), to read more "
        "of an answer, or to send the next request.",
    )
    max_request_seconds: int = Field(
        600,
        ge=1,
        le=MAX_REQUEST_SECONDS,
        description="Time for a request, then 504. The header x-request-timeout asks for less.",
    )
    max_stall_seconds: float = Field(
        4,
        ge=1,
        le=3600,
        description="Time without progress, which a single layer is, after which the worker counts as stuck: "
        "/readyz and whatever waits get 503. It has 15 times as long while it computes.",
    )
    grace_seconds: int = Field(
        30, ge=0, le=3600, description="Time for running requests to finish after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages to log."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of a log line.")

    @field_validator("admin_port")
    @classmethod
    def _choose_admin_port(cls, value: int | None, info: ValidationInfo) -> int | None:
        """None for one listener."""
        host, port = info.data.get("host"), info.data.get("port")
        if host is None or port is None:
            return value
        if value is None and not is_loopback(host):
            return port + 1 if 0 < port < MAX_PORT else 0
        return None if value and value == port else value

    @field_validator("bases", mode="before")
    @classmethod
    def _parse_bases(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if not isinstance(value, list):
            return value
        bases: dict[str, str] = {}
        for entry in value:
            name, source = _parse_base(entry)
            if name in bases:
                raise ValueError(f"two bases are named {name!r}")
            bases[name] = source
        return bases

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
            raise ValueError(f"{value!r} is no device: use cpu, cuda or cuda:1")
        return value

    @field_validator("sources", mode="before")
    @classmethod
    def _parse_sources(cls, value: Any) -> Any:
        prefixes = [part for part in value.split(",") if part] if isinstance(value, str) else list(value)
        for prefix in prefixes:
            if not re.fullmatch(SOURCE_PATTERN, prefix):
                raise ValueError(f"{prefix!r} is no prefix of sources: hf://ORG/ or s3://BUCKET/PREFIX/")
        return tuple(prefixes)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.bases:
            raise ValueError("at least one base is needed: --base NAME=FOLDER")
        self._check_listeners()
        if self.max_inputs > self.max_queue:
            raise ValueError("max_inputs must not exceed max_queue")
        if self.max_sequences > self.max_batch_tokens:
            raise ValueError("max_sequences must not exceed max_batch_tokens")
        self._check_precisions()
        return self

    def _check_precisions(self) -> None:
        asked = {self.precision, self.routed_precision}
        if self.device != "cpu" and asked & {"int8", "int4"}:
            raise ValueError("weights in 8 or 4 bits need device cpu: on a GPU use fp32, bf16 or mixed")
        if self.precision == "mixed" and self.routed_precision not in (None, "bf16"):
            raise ValueError("precision mixed has its routed layers in bf16: leave routed_precision out")
        if self.precision == "int8" and self.routed_precision not in (None, "int8", "int4"):
            raise ValueError("beside precision int8 routed_precision can only be int4")
        if self.precision == "int4" and self.routed_precision not in (None, "int4"):
            raise ValueError("beside precision int4 routed_precision can only be the same")
        if self.backend == "onnx" and (self.device != "cpu" or asked & {"bf16", "mixed", "fp64"}):
            raise ValueError("the backend onnx needs device cpu and fp32, int8 or int4")

    def _check_listeners(self) -> None:
        hosts = [self.host] if self.admin_port is None else [self.host, self.admin_host]
        reachable = [host for host in hosts if not is_loopback(host)]
        if reachable and self.database is None and not self.insecure:
            raise ValueError(
                f"without --database anyone who reaches {reachable[0]} could use this server: "
                "create API keys (molex key create), listen on 127.0.0.1, or say --insecure"
            )

    @property
    def http_root(self) -> Path | None:
        """The folder that HTTP callers may load adapters from; None where they may not load any."""
        return self.adapter_root or self.adapters


def is_option(field: FieldInfo) -> bool:
    """Whether a setting may stand on a command line, where others can see it."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("environment_only"))


def shown(settings: CatalogueSettings) -> Iterator[str]:
    """Every setting as a line, without secrets: the pepper, and what a database URL has of them."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name == "database" and value is not None:
            value = parse_url(value).set(query={}).render_as_string(hide_password=True)
        origin = "" if name in settings.model_fields_set else "  (default)"
        yield f"{name} = {'' if value is None else value}{origin}"


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def problems(error: ValidationError) -> list[str]:
    """What is wrong with settings, a line each that names the setting. Values are not repeated."""
    return [
        f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()
    ]


def _parse_base(entry: str) -> tuple[str, str]:
    name, separator, source = entry.partition("=")
    if not separator:
        name, source = Path(entry).name, entry
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is no name for a base: use letters, digits, '.', '_' and '-'")
    if not source:
        raise ValueError(f"base {name!r} has no folder")
    return name, source
