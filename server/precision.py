"""In which precision the layers of a base run, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from server.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""What a CPU that multiplies bfloat16 matrices in hardware says of itself: x86's two, and Arm's."""


@dataclass(frozen=True)
class Precision:
    """Of a depth's own layer, with all that is not a routed layer, and of routed layers."""

    own: torch.dtype
    routed: torch.dtype
    reason: str

    def __str__(self) -> str:
        own, routed = (str(dtype).removeprefix("torch.") for dtype in (self.own, self.routed))
        layers = "" if own == routed else f", routed layers in {routed}"
        return f"{own}{layers} ({self.reason})"


def choose_precision(settings: Settings, flags: dict[str, Any] | None = None) -> Precision:
    """What the settings ask for; `flags` are the CPU's, by default as PyTorch reads them."""
    name, reason = settings.precision, "as set"
    if name == "auto":
        found = [flag for flag in BFLOAT16_FLAGS if (flags or torch.cpu.get_capabilities()).get(flag)]
        name = "bf16" if found else "fp32"
        reason = f"chosen: this CPU has {found[0]}" if found else "chosen: this CPU has no bfloat16 products"
    if name == "mixed":
        return Precision(torch.float32, torch.bfloat16, reason)
    own = DTYPES[name]
    return Precision(own, DTYPES[settings.routed_precision or name], reason)
