"""In which precision the layers of a base run, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from molex.errors import BaseModelError
from molex.exported import is_exported, read_about
from molex.native import build
from molex.native.weights import Bits
from server.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""What a CPU that multiplies bfloat16 matrices in hardware says of itself: x86's two, and Arm's."""
KERNELS_FLAG = "avx512_bf16"
"""The one whose products the kernels use."""


@dataclass(frozen=True)
class Precision:
    """Of a depth's own layer, with all that is not a routed layer, and of routed layers.

    `bits` and `routed_bits` are those of weights that are rounded; activations are in the precisions above.
    """

    own: torch.dtype
    routed: torch.dtype
    reason: str
    bits: Bits | None = None
    routed_bits: Bits | None = None

    def __str__(self) -> str:
        own = _spelled(self.own, self.bits)
        routed = _spelled(self.routed, self.routed_bits or self.bits)
        layers = "" if own == routed else f", routed layers in {routed}"
        return f"{own}{layers} ({self.reason})"


def choose_precision(settings: Settings, flags: Mapping[str, Any] | None = None) -> Precision:
    """What the settings ask for; `flags` are the CPU's, by default as PyTorch reads them."""
    name, reason = settings.precision, "as set"
    flags = flags or torch.cpu.get_capabilities()
    fastest, why = _fastest(settings, flags)
    if name == "auto":
        name, reason = fastest, f"chosen: {why}"
    if name == "mixed":
        return Precision(torch.float32, torch.bfloat16, reason)
    own = DTYPES[_beside_few_bits(settings, flags) if name in BITS else name]
    routed, bits = settings.routed_precision, BITS.get(name)
    if routed is None or routed in BITS:
        return Precision(own, own, reason, bits, BITS.get(routed or name))
    return Precision(own, DTYPES[routed], reason)


def precision_of(source: str, settings: Settings) -> Precision:
    """The same for a base; where it was exported, `auto` is what it was exported in.

    Raises BaseModelError where the settings ask for another one, or the base does not say what it is.
    """
    if not is_exported(source):
        return choose_precision(settings)
    changes: dict[str, Any] = {"backend": "onnx"}
    about = read_about(Path(source))
    if settings.precision == "auto":
        changes |= {"precision": about.precision, "routed_precision": about.routed_precision}
        return replace(choose_precision(settings.model_copy(update=changes)), reason="as exported")
    precision = choose_precision(settings.model_copy(update=changes))
    if (precision.bits, precision.routed_bits) != (about.bits, about.routed_bits):
        message = f"was exported in {about}: ask for that, or for precision auto"
        raise BaseModelError(f"base model {source!r} {message}")
    return precision


def _fastest(settings: Settings, flags: Mapping[str, Any]) -> tuple[Literal["bf16", "fp32"], str]:
    if settings.backend == "onnx":
        return "fp32", "on a CPU ONNX Runtime computes in it alone"
    if settings.device != "cpu":
        return "bf16", "a GPU runs the layers of a depth together in it"
    found = [flag for flag in BFLOAT16_FLAGS if flags.get(flag)]
    if not found:
        return "fp32", "this CPU has no bfloat16 products"
    if settings.routed_precision in BITS and (why_not := _why_not_on_kernels()) is not None:
        return "fp32", f"the kernels {why_not}, and ONNX Runtime computes in it alone"
    return "bf16", f"this CPU has {found[0]}"


def _beside_few_bits(settings: Settings, flags: Mapping[str, Any]) -> Literal["bf16", "fp32"]:
    """What weights in few bits run beside: ONNX Runtime has float32 alone, kernels gain by bf16 on some."""
    gains = settings.backend != "onnx" and flags.get(KERNELS_FLAG) and _why_not_on_kernels() is None
    return "bf16" if gains else "fp32"


def _why_not_on_kernels() -> str | None:
    """Why this machine cannot run them in bfloat16; None where it can. They may be compiled for it."""
    return build.why_not(torch.bfloat16, torch.device("cpu"))


def _spelled(dtype: torch.dtype, bits: Bits | None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if bits is None else f"{name} with weights in {bits} bits"
