"""Fused projections are the separate ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from molex.lora import ActiveLora, AdaptedLinear, BatchLora, LoraSwitch, LoraWeights, LowRank
from molex.packing import Packed
from molex.prepack import can_prepack
from molex.projections import Projections

CPU = torch.device("cpu")
INPUTS, OUTPUTS = 6, {"query": 8, "key": 4, "value": 4}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def projections(dtype, bias, switch):
    torch.manual_seed(0)
    return Projections(
        [
            AdaptedLinear(nn.Linear(INPUTS, width, bias=bias, dtype=dtype), (0, name), switch)
            for name, width in OUTPUTS.items()
        ]
    )


def updates(seed, *names):
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights(
        {
            (0, name): LowRank(
                torch.randn(2, INPUTS, generator=generator),
                torch.randn(OUTPUTS[name], 2, generator=generator),
                0.5,
            )
            for name in names
        }
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("adapted", [[], ["query", "value"], ["query", "key", "value"]], ids=len)
@torch.no_grad()
def test_fused_projections_are_the_separate_ones_side_by_side(dtype, bias, adapted):
    if not can_prepack(dtype, CPU):
        pytest.skip(f"this CPU has no products of {dtype}")
    switch, fused_switch = LoraSwitch(), LoraSwitch()
    separate, fused = projections(dtype, bias, switch), projections(dtype, bias, fused_switch)
    fused.prepack()
    x = torch.randn(7, INPUTS).to(dtype)
    packed = Packed([4, 1, 2], [0] * 3, [0, 1, 1], causal=False, device=CPU)
    active = ActiveLora(
        BatchLora([updates(1, *adapted), updates(2, *adapted[:1])]), packed.segments(np.arange(3))
    )
    expected, given = switch.call(active, separate, x), fused_switch.call(active, fused, x)
    assert given.shape == (7, sum(OUTPUTS.values()))
    torch.testing.assert_close(given, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_separate_weights_are_let_go():
    fused = projections(torch.float32, True, LoraSwitch())
    fused.prepack()
    assert not [p for module in fused.modules for p in module.parameters()]
