"""Which backend runs the layers, where the kernels cannot."""

from __future__ import annotations

import pytest
import torch

from molex import MolexModel, backends
from molex.errors import BaseModelError
from molex.layers import StockLayers
from molex.native import build
from molex.onnx.layers import OnnxLayers


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda dtype, device: "need a CPU with AVX2")


@pytest.fixture
def model(base_folder):
    return MolexModel.from_pretrained(base_folder("roberta"))


@pytest.fixture
def no_onnx(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("taken", "kind", "runs_on"),
    [
        ([1.0, 2.0], OnnxLayers, "ONNX Runtime: a layer takes it 1.00 ms for 32 tokens, PyTorch 2.00; "),
        ([2.0, 1.0], StockLayers, "PyTorch: a layer takes it 1.00 ms for 32 tokens, ONNX Runtime 2.00; "),
    ],
)
def test_the_faster_one_is_taken(taken, kind, runs_on, model, no_kernels, monkeypatch):
    monkeypatch.setattr(backends, "milliseconds", lambda contestants, wanted: taken)
    model.prepack()
    assert isinstance(model.backbone.layers, kind)
    assert model.runs_on == f"{runs_on}the kernels need a CPU with AVX2"
    assert model([[5, 6]]).logits[0].shape == (2, model.spec.hidden_size)


def test_both_are_measured(model, no_kernels):
    stock = model.backbone.layers
    wanted = backends.Wanted(stock, model.backbone.family, model.backbone.config)
    assert all(taken > 0 for taken in backends.milliseconds([stock, stock], wanted))
    model.prepack()
    assert "ms for 32 tokens" in model.runs_on


def test_without_onnx_runtime_layers_run_on_pytorch(model, no_kernels, no_onnx):
    model.prepack()
    assert isinstance(model.backbone.layers, StockLayers)
    assert model.runs_on == "PyTorch: the kernels need a CPU with AVX2"
    assert model([[5, 6]]).logits[0].shape == (2, model.spec.hidden_size)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_run_on_onnx_runtime_where_the_kernels_cannot(bits, model, no_kernels):
    model.prepack(routed_bits=bits)
    assert isinstance(model.backbone.layers, OnnxLayers)
    assert model.runs_on == "ONNX Runtime: the kernels need a CPU with AVX2"


def test_few_bits_take_one_of_the_two(model, no_kernels, no_onnx):
    message = r"8-bit weights need the kernels, which need .*, or ONNX Runtime: it is not installed: pip"
    with pytest.raises(BaseModelError, match=message):
        model.prepack(bits=8)


def test_in_bfloat16_onnx_runtime_is_no_choice(base_folder, no_kernels):
    model = MolexModel.from_pretrained(base_folder("roberta"), torch.bfloat16)
    model.prepack()
    assert isinstance(model.backbone.layers, StockLayers)


def test_who_asks_for_onnx_runtime_gets_nothing_else(model, no_onnx):
    with pytest.raises(BaseModelError, match=r"ONNX Runtime .* is not installed: pip install 'molex-serve"):
        model.prepack(backend="onnx")
