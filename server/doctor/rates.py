"""The kernels and what they reach here: measured on a layer, as it is served."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from transformers import AutoConfig, AutoModel

from molex.backbone import Backbone
from molex.native import build
from molex.native.weights import Bits
from molex.stage import Stage
from server.doctor.finding import Finding
from server.precision import DTYPES, choose_precision
from server.settings import Settings

LAYER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
"""RoBERTa-base's."""
TOKENS = 128
SECONDS = 0.15
"""How long each precision is measured for, or for one pass, if that takes longer."""
CPU = torch.device("cpu")


def kernels() -> Finding:
    """Whether the project's own kernels run here, after loading them, and if need be compiling them."""
    begin = time.perf_counter()
    reasons = {name: build.why_not(DTYPES[name], CPU) for name in ("fp32", "bf16")}
    took = time.perf_counter() - begin
    good = [name for name, reason in reasons.items() if reason is None]
    parts = [f"loaded in {took:.1f} s for {' and '.join(good)}"] if good else []
    parts += [f"not for {name}: they {reason}" for name, reason in reasons.items() if reason is not None]
    return Finding("kernels", "; ".join(parts))


def precision(settings: Settings | None) -> Iterator[Finding]:
    """What each precision reaches here, which one `auto` takes, and which is set."""
    rates = measured_rates()
    shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    yield Finding("rates", f"{shown} GFLOP/s, in a layer of RoBERTa-base's shape on {TOKENS} tokens")
    asked = settings or Settings.model_construct()
    auto = choose_precision(asked.model_copy(update={"precision": "auto", "routed_precision": None}))
    ratio = rates["bf16"] / rates["fp32"]
    fact = f"auto is {auto}, and bf16 has {ratio:.1f} times the rate of fp32"
    yield Finding("precision", fact if settings is None else f"{choose_precision(settings)}; {fact}")


def measured_rates() -> Mapping[str, float]:
    """GFLOP/s of a layer by precision; weights in 8 bits only where the kernels run."""
    rates = {name: layer_rate(dtype) for name, dtype in DTYPES.items()}
    if build.why_not(torch.float32, CPU) is None:
        beside = choose_precision(Settings.model_construct(precision="int8")).own
        rates["int8"] = layer_rate(beside, bits=8)
    return rates


@torch.inference_mode()
def layer_rate(dtype: torch.dtype, bits: Bits | None = None) -> float:
    """GFLOP/s of the linear layers of a random layer, in a precision, everything else of it included."""
    config = AutoConfig.for_model("roberta", vocab_size=8, **LAYER)
    model = AutoModel.from_config(config, dtype=dtype, add_pooling_layer=False)
    backbone = Backbone(model)
    backbone.prepack(bits)
    stage = Stage.of_the_base(TOKENS, CPU)
    x = torch.randn(TOKENS, LAYER["hidden_size"]).to(dtype)

    def run() -> None:
        backbone.layers.project(stage, [0], x)
        backbone.layers.finish(stage, [0], x, x)

    flops = 2 * TOKENS * sum(inputs * outputs for inputs, outputs in backbone.modules.values())
    run()
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return flops / best / 1e9
