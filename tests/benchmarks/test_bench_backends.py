"""What bench_backends makes of medians."""

from __future__ import annotations

from benchmarks.backend_arm import PRECISIONS
from benchmarks.bench_backends import ARMS, OF_KERNELS, YARDSTICK, arms, figures_of
from molex.native import build


def test_figures_are_ratios_to_pytorch_in_float32():
    [faster, slower] = figures_of("classify 1", {"torch fp32": 0.2, "onnx fp32": 0.1, "torch bf16": 0.4})
    assert (faster.what, faster.value) == ("torch fp32 / onnx fp32, classify 1", 2.0)
    assert (slower.what, slower.value) == ("torch fp32 / torch bf16, classify 1", 0.5)
    assert faster.measured == {"torch fp32, ms": 200.0, "onnx fp32, ms": 100.0}


def test_every_arm_has_a_precision_that_the_process_knows():
    assert YARDSTICK in ARMS
    assert {precision for _, precision in (*ARMS, *OF_KERNELS)} <= set(PRECISIONS)


def test_kernels_are_left_out_where_they_cannot_run(monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda dtype, device: "need a CPU with AVX2")
    assert arms() == [*ARMS]
