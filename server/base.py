"""One base model with what is needed to serve it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from molex.errors import BaseModelError
from molex.model import MolexModel
from server.precision import precision_of
from server.runner import ModelRunner
from server.settings import Settings
from server.tokenization import Tokenization


@dataclass(frozen=True)
class Base:
    """A base model, loaded once, shared by all its adapters."""

    name: str
    model: MolexModel
    tokenization: Tokenization
    runner: ModelRunner
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since the epoch."""


def load_base(name: str, source: str, settings: Settings) -> Base:
    """Load a base from a local folder or hub id.

    Raises BaseModelError where it cannot be served.
    """
    precision, device = precision_of(source, settings), _device(name, settings)
    model = MolexModel.from_pretrained(source, precision.own, device, routed_dtype=precision.routed)
    try:
        model.prepack(precision.bits, precision.routed_bits, settings.backend)
    except BaseModelError as error:
        raise BaseModelError(f"base {name!r}: {error}") from error
    model.use_bank(settings.max_bank_bytes)
    tokenization = Tokenization.from_pretrained(source, model.spec, max_length=settings.max_length)
    runner = ModelRunner(
        model,
        tokenization,
        cache_tokens=settings.max_cache_tokens,
        reuse_prefixes=settings.prefix_reuse == "on",
    )
    return Base(name, model, tokenization, runner)


def _device(name: str, settings: Settings) -> torch.device:
    device = torch.device(settings.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"PyTorch {torch.__version__} finds {torch.cuda.device_count()} GPUs here"
        raise BaseModelError(f"base {name!r}: there is no device {settings.device}: {found}")
    return device
