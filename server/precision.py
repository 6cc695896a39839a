"""In which precision the layers of a base run, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from server.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""What a CPU that multiplies bfloat16 matrices in hardware says of itself: x86's two, and Arm's."""


@dataclass(frozen=True)
class Precision:
    """Of a depth's own layer, with all that is not a routed layer, and of routed layers.

    `int8` and `routed_int8` say whose weights have 8 bits; activations are in the precisions above.
    """

    own: torch.dtype
    routed: torch.dtype
    reason: str
    int8: bool = False
    routed_int8: bool = False

    def __str__(self) -> str:
        own = _spelled(self.own, self.int8)
        routed = _spelled(self.routed, self.int8 or self.routed_int8)
        layers = "" if own == routed else f", routed layers in {routed}"
        return f"{own}{layers} ({self.reason})"


def choose_precision(settings: Settings, flags: dict[str, Any] | None = None) -> Precision:
    """What the settings ask for; `flags` are the CPU's, by default as PyTorch reads them."""
    name, reason = settings.precision, "as set"
    found = [flag for flag in BFLOAT16_FLAGS if (flags or torch.cpu.get_capabilities()).get(flag)]
    fastest: Literal["bf16", "fp32"] = "bf16" if found else "fp32"
    if name == "auto":
        name = fastest
        reason = f"chosen: this CPU has {found[0]}" if found else "chosen: this CPU has no bfloat16 products"
    if name == "mixed":
        return Precision(torch.float32, torch.bfloat16, reason)
    own = DTYPES[fastest if name == "int8" else name]
    routed = settings.routed_precision
    if routed in (None, "int8"):
        return Precision(own, own, reason, int8=name == "int8", routed_int8=routed == "int8")
    return Precision(own, DTYPES[routed], reason)


def _spelled(dtype: torch.dtype, int8: bool) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{name} with weights in 8 bits" if int8 else name
