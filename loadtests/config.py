"""The TOML file of an experiment, read strictly: every error names the file and the key."""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

import httpx
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loadtests.dialects import DialectName
from loadtests.errors import ConfigError
from loadtests.popularity import check_popularity

Name = Annotated[str, Field(min_length=1, max_length=256)]
Seconds = Annotated[float, Field(gt=0, le=600)]
Rate = Annotated[float, Field(gt=0, le=10_000)]
Share = Annotated[float, Field(gt=0, le=2)]


class Section(BaseModel):
    """A part of the file: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Arm(Section):
    """One contestant: a server, the dialect it speaks and the models that requests go to."""

    name: Name
    url: str
    dialect: DialectName
    models: Annotated[list[Name], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Length of a completion."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str, info: ValidationInfo) -> str:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is no URL: {error}") from None
        valid_port = parsed.port is None or parsed.port < 2**16
        if parsed.scheme not in ("http", "https") or not parsed.host or not valid_port:
            raise ValueError(f"{url!r} is no HTTP URL")
        remote_allowed = bool(info.context and info.context["allow_remote"])
        if not remote_allowed and not _is_loopback(parsed.host):
            raise ValueError(f"{parsed.host} is not this machine; --allow-remote permits it")
        return url

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if (self.dialect == "openai-completions") != (self.max_tokens is not None):
            raise ValueError("openai-completions needs max_tokens, and the other dialects have none")
        return self


class Config(Section):
    """An experiment. Rates are requests per second; exactly one of `rates` and `shares` is given."""

    arms: Annotated[list[Arm], Field(min_length=1, max_length=16)]
    """The others are compared with the first."""
    texts: str
    """File of texts, relative to the configuration."""
    popularity: Annotated[str, AfterValidator(check_popularity)] = "uniform"
    rates: Annotated[list[Rate], Field(min_length=1, max_length=32)] | None = None
    shares: Annotated[list[Share], Field(min_length=1, max_length=32)] | None = None
    """Parts of the capacity of the slowest arm, so that all arms get the same load."""
    rounds: Annotated[int, Field(ge=2, le=1000)] = 10
    """Blocks for each arm at each rate."""
    block_seconds: Seconds = 10.0
    warmup_seconds: Seconds = 5.0
    num_clients: Annotated[int, Field(ge=1, le=1024)] = 16
    """Requests in flight while warming up and measuring capacity."""
    timeout_seconds: Seconds = 30.0
    max_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    """In one block."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.rates is None) == (self.shares is None):
            raise ValueError("give either rates or shares")
        if len({arm.name for arm in self.arms}) < len(self.arms):
            raise ValueError("two arms have the same name")
        loads = self.rates or self.shares or []
        if len(set(loads)) < len(loads):
            raise ValueError("rates or shares have a value twice")
        return self


def read_config(path: Path, *, allow_remote: bool) -> Config:
    """The configuration in a file. Raises ConfigError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        return Config.model_validate(data, context={"allow_remote": allow_remote})
    except ValidationError as error:
        problems = [_describe(path, problem) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _describe(path: Path, problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {key}: {message}" if key else f"{path}: {message}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
