"""Every setting of the service, spelled once: `molex serve` makes its options from this class.

A setting comes from the command line, else from the environment (`MOLEX_PORT=9000`), else from here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""Names of bases and adapters: safe in a URL, a file name and a metric label."""


class Settings(BaseSettings):
    """Settings of one server process."""

    model_config = SettingsConfigDict(env_prefix="MOLEX_", extra="forbid", frozen=True)

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
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    precision: Literal["auto", "fp32", "bf16", "int8", "fp64", "mixed"] = Field(
        "fp32",
        description="Precision of the base models. int8: weights of layers in 8 bits, all else in bf16 where "
        "the CPU has instructions for it; mixed: fp32 with routed layers in bf16; auto: bf16 or else fp32.",
    )
    routed_precision: Literal["fp32", "bf16", "int8", "fp64"] | None = Field(
        None, description="Precision of routed layers alone. Default: that of the others."
    )
    max_batch_tokens: int = Field(2048, ge=1, le=1_048_576, description="Token budget of one forward pass.")
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
        1024, ge=1, le=1_048_576, description="Waiting sequences per base; beyond it callers get 429."
    )
    max_length: int = Field(
        2048, ge=2, le=1_048_576, description="Longest sequence in tokens, where the base allows it."
    )
    max_inputs: int = Field(256, ge=1, le=4096, description="Texts or prompts in one request.")
    max_body_bytes: int = Field(4_194_304, ge=1024, le=1_073_741_824, description="Largest request body.")
    max_adapters: int = Field(
        10_000, ge=1, le=1_000_000, description="Adapters registered at a time, in memory or not."
    )
    max_resident_adapters: int = Field(
        1024, ge=1, le=1_000_000, description="Adapters in memory at a time; the least recently used go."
    )
    max_resident_bytes: int = Field(
        4_294_967_296, ge=1, le=2**50, description="Memory for the weights of adapters."
    )
    pool_threads: int = Field(
        4, ge=1, le=256, description="Threads that tokenize, and as many that read adapters."
    )
    grace_seconds: int = Field(
        30, ge=0, le=3600, description="Time for running requests to finish after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages to log."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of a log line.")

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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.bases:
            raise ValueError("at least one base is needed: --base NAME=FOLDER")
        if self.max_inputs > self.max_queue:
            raise ValueError("max_inputs must not exceed max_queue")
        if self.max_sequences > self.max_batch_tokens:
            raise ValueError("max_sequences must not exceed max_batch_tokens")
        if self.precision == "mixed" and self.routed_precision not in (None, "bf16"):
            raise ValueError("precision mixed has its routed layers in bf16: leave routed_precision out")
        if self.precision == "int8" and self.routed_precision not in (None, "int8"):
            raise ValueError("precision int8 has 8-bit weights in all layers: leave routed_precision out")
        return self

    @property
    def http_root(self) -> Path | None:
        """The folder that HTTP callers may load adapters from; None where they may not load any."""
        return self.adapter_root or self.adapters


def _parse_base(entry: str) -> tuple[str, str]:
    name, separator, source = entry.partition("=")
    if not separator:
        name, source = Path(entry).name, entry
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is no name for a base: use letters, digits, '.', '_' and '-'")
    if not source:
        raise ValueError(f"base {name!r} has no folder")
    return name, source
