"""Kernels and rates, measured."""

from __future__ import annotations

import pytest
import torch

from molex.native import build
from server.doctor import rates
from server.settings import Settings


def test_every_precision_that_runs_here_is_measured():
    measured = rates.measured_rates()
    native = build.why_not(torch.float32, rates.CPU) is None
    assert set(measured) == {"fp32", "bf16", "fp64"} | ({"int8"} if native else set())
    assert all(rate > 0 for rate in measured.values())


def test_a_cpu_without_the_kernels_is_told_why(monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda dtype, device: "need a CPU with AVX2")
    assert (
        rates.kernels().fact
        == "not for fp32: they need a CPU with AVX2; not for bf16: they need a CPU with AVX2"
    )
    assert "int8" not in rates.measured_rates()


@pytest.mark.parametrize("flags", [{"avx512_bf16": True}, {}])
def test_the_choice_of_auto_has_its_reason_and_its_gain(monkeypatch, flags):
    monkeypatch.setattr(rates, "measured_rates", lambda: {"fp32": 100.0, "bf16": 250.0})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    settings = Settings(bases={"a": "/x"}, precision="mixed")
    shown, chosen = (finding.fact for finding in rates.precision(settings))
    assert shown.startswith("fp32 100, bf16 250 GFLOP/s")
    assert chosen.startswith("float32, routed layers in bfloat16 (as set); auto is ")
    assert ("bfloat16 (chosen: this CPU has avx512_bf16)" if flags else "no bfloat16 products") in chosen
    assert chosen.endswith("bf16 has 2.5 times the rate of fp32")
    [_, alone] = rates.precision(None)
    assert alone.fact.startswith("auto is ")
