"""Which precision is chosen, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from molex.errors import BaseModelError
from molex.export import export
from molex.native import build
from server.precision import choose_precision, precision_of
from server.settings import Settings

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Why they cannot run here: nothing, whatever this machine is."""
    reasons = [None]
    monkeypatch.setattr(build, "why_not", lambda dtype, device: reasons[-1])
    return reasons


def chosen(flags=None, **settings):
    return choose_precision(Settings(bases=["a=/x"], **settings), flags)


@pytest.mark.parametrize(
    ("settings", "own", "routed"),
    [
        ({}, FLOAT32, FLOAT32),
        ({"precision": "bf16"}, BFLOAT16, BFLOAT16),
        ({"precision": "mixed"}, FLOAT32, BFLOAT16),
        ({"precision": "mixed", "routed_precision": "bf16"}, FLOAT32, BFLOAT16),
        ({"precision": "fp64", "routed_precision": "fp32"}, FLOAT64, FLOAT32),
        ({"precision": "bf16", "routed_precision": "fp32"}, BFLOAT16, FLOAT32),
    ],
    ids=str,
)
def test_settings_say_the_precision_of_each_branch(settings, own, routed):
    precision = chosen(**settings)
    assert (precision.own, precision.routed) == (own, routed)


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
def test_auto_takes_bfloat16_where_the_cpu_has_instructions_for_it(flag):
    precision = chosen({"avx2": True, flag: True}, precision="auto")
    assert precision.own == precision.routed == BFLOAT16
    assert str(precision) == f"bfloat16 (chosen: this CPU has {flag})"


def test_auto_takes_float32_elsewhere_and_leaves_routed_layers_to_their_setting():
    flags = {"avx2": True, "avx512_bf16": False}
    assert chosen(flags, precision="auto").own == FLOAT32
    precision = chosen(flags, precision="auto", routed_precision="bf16")
    assert str(precision) == (
        "float32, routed layers in bfloat16 (chosen: this CPU has no bfloat16 products)"
    )


def test_a_gpu_runs_in_bfloat16_whatever_the_cpu_has():
    precision = chosen({"avx2": True}, precision="auto", device="cuda:1")
    assert precision.own == precision.routed == BFLOAT16
    assert str(precision) == "bfloat16 (chosen: a GPU runs the layers of a depth together in it)"
    assert chosen({"amx_bf16": True}, device="cuda").own == FLOAT32


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "int8"}, "as set"),
        ({"precision": "int4"}, "as set"),
        (
            {"precision": "auto", "routed_precision": "int8"},
            "chosen: the kernels could not be built, and ONNX Runtime computes in it alone",
        ),
    ],
    ids=str,
)
def test_few_bits_run_beside_float32_where_the_kernels_cannot_run(settings, reason, kernels):
    flags = {"avx2": True, "avx512_bf16": True}
    assert chosen(flags, **settings).own == BFLOAT16
    kernels.append("could not be built")
    precision = chosen(flags, **settings)
    assert (precision.own, precision.routed, precision.reason) == (FLOAT32, FLOAT32, reason)


def test_mixed_contradicts_another_precision_of_routed_layers():
    with pytest.raises(ValueError, match="leave routed_precision out"):
        chosen(precision="mixed", routed_precision="fp32")


@pytest.mark.parametrize(
    ("settings", "weights", "words"),
    [
        ({"precision": "int8"}, (8, 8), "bfloat16 with weights in 8 bits (as set)"),
        (
            {"precision": "fp32", "routed_precision": "int8"},
            (None, 8),
            "float32, routed layers in float32 with weights in 8 bits (as set)",
        ),
        (
            {"precision": "int8", "routed_precision": "int4"},
            (8, 4),
            "bfloat16 with weights in 8 bits, routed layers in bfloat16 with weights in 4 bits (as set)",
        ),
        ({"precision": "int4"}, (4, 4), "bfloat16 with weights in 4 bits (as set)"),
        ({"precision": "bf16"}, (None, None), "bfloat16 (as set)"),
        ({"precision": "int8", "backend": "onnx"}, (8, 8), "float32 with weights in 8 bits (as set)"),
        (
            {"precision": "auto", "backend": "onnx"},
            (None, None),
            "float32 (chosen: on a CPU ONNX Runtime computes in it alone)",
        ),
    ],
)
def test_bits_are_those_of_weights(settings, weights, words):
    precision = chosen({"avx512_bf16": True}, **settings)
    assert (precision.bits, precision.routed_bits) == weights
    assert str(precision) == words


def test_8_bits_leave_activations_in_float32_where_the_cpu_has_no_bfloat16():
    assert chosen({"avx2": True}, precision="int8").own == FLOAT32


def test_8_bits_leave_activations_in_float32_where_the_kernels_have_no_bfloat16():
    """ONNX Runtime runs the layers there, which has none."""
    assert chosen({"bf16": True}, precision="int8").own == FLOAT32
    assert chosen({"bf16": True}, precision="auto").own == BFLOAT16


def test_int8_contradicts_another_precision_of_routed_layers():
    with pytest.raises(ValueError, match="beside precision int8 routed_precision can only be int4"):
        chosen(precision="int8", routed_precision="bf16")


def test_int4_leaves_nothing_to_routed_layers():
    with pytest.raises(ValueError, match="beside precision int4 routed_precision can only be the same"):
        chosen(precision="int4", routed_precision="int8")


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16"}, {"precision": "mixed"}, {"routed_precision": "bf16"}, {"device": "cuda"}],
    ids=str,
)
def test_onnx_runtime_is_given_what_it_can_do(settings):
    with pytest.raises(ValueError, match="the backend onnx needs device cpu and fp32, int8 or int4"):
        chosen(backend="onnx", **settings)


def test_an_exported_base_says_its_precision(base_folder, tmp_path):
    folder = str(tmp_path / "exported")
    export(base_folder("bert"), Path(folder), "int8", "int4")
    auto, named = (Settings(bases=[f"a={folder}"], precision=name) for name in ("auto", "int8"))
    assert str(precision_of(folder, auto)) == (
        "float32 with weights in 8 bits, routed layers in float32 with weights in 4 bits (as exported)"
    )
    both = named.model_copy(update={"routed_precision": "int4"})
    assert precision_of(folder, both) == replace(precision_of(folder, auto), reason="as set")
    with pytest.raises(BaseModelError, match="exported in int8, routed ones in int4: ask for that, or for"):
        precision_of(folder, named)
    assert precision_of(str(base_folder("bert")), named) == choose_precision(named)
