"""Which precision is chosen, and why."""

from __future__ import annotations

import pytest
import torch

from server.precision import choose_precision
from server.settings import Settings

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64


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
        ({"precision": "bf16"}, (None, None), "bfloat16 (as set)"),
    ],
)
def test_bits_are_those_of_weights(settings, weights, words):
    precision = chosen({"avx512_bf16": True}, **settings)
    assert (precision.bits, precision.routed_bits) == weights
    assert str(precision) == words


def test_8_bits_leave_activations_in_float32_where_the_cpu_has_no_bfloat16():
    assert chosen({"avx2": True}, precision="int8").own == FLOAT32


def test_int8_contradicts_another_precision_of_routed_layers():
    with pytest.raises(ValueError, match="beside precision int8 routed_precision can only be int4"):
        chosen(precision="int8", routed_precision="bf16")
