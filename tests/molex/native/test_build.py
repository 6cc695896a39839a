"""Compiling the kernels, and doing without them."""

from __future__ import annotations

import pytest
import torch

from molex import MolexModel
from molex.errors import BaseModelError
from molex.layers import StockLayers
from molex.native import build
from tests.molex.native.kernels import CPU, needs_kernels


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    """No library has been compiled or loaded yet; nothing is loaded twice into this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    loaded = []
    monkeypatch.setattr(torch.classes, "load_library", loaded.append)
    return loaded


def test_a_library_is_compiled_once(fresh_cache, monkeypatch):
    calls = []
    monkeypatch.setattr(build, "_compile", lambda output: (calls.append(output), output.touch()))
    assert build.load() is None
    assert build.load() is None
    assert len(calls) == 1
    assert len(set(fresh_cache)) == 1


def test_other_sources_are_another_library(fresh_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_compile", lambda output: output.touch())
    build.load()
    changed = tmp_path / "src"
    changed.mkdir()
    (changed / "library.cpp").write_text("// changed")
    monkeypatch.setattr(build, "SOURCES", changed)
    build.load()
    assert len(set(fresh_cache)) == 2


def test_without_a_compiler_the_reason_is_told(fresh_cache, monkeypatch):
    monkeypatch.setattr(build, "COMPILER", "no-such-compiler")
    assert build.load() == "could not be built: there is no no-such-compiler on the PATH"


def test_a_compiler_that_fails_is_quoted(fresh_cache, monkeypatch, tmp_path):
    broken = tmp_path / "src"
    broken.mkdir()
    (broken / "library.cpp").write_text("#error this is no kernel")
    monkeypatch.setattr(build, "SOURCES", broken)
    assert "c++ failed" in build.load()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_run_on_pytorch(dtype):
    assert build.why_not(dtype, CPU) is not None


def test_who_asks_for_the_kernels_gets_nothing_else(base_folder, monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda dtype, device: "need a CPU with AVX-512")
    model = MolexModel.from_pretrained(base_folder("roberta"))
    with pytest.raises(BaseModelError, match="cannot run the layers: they need a CPU with AVX-512"):
        model.prepack(backend="kernels")


def test_who_asks_for_pytorch_gets_nothing_else(base_folder):
    model = MolexModel.from_pretrained(base_folder("roberta"))
    with pytest.raises(BaseModelError, match=r"8-bit weights need the kernels, .* with the backend torch"):
        model.prepack(bits=8, backend="torch")
    model.prepack(backend="torch")
    assert isinstance(model.backbone.layers, StockLayers)
    assert model.runs_on == "PyTorch: the kernels are not used with the backend torch"


@needs_kernels
def test_what_runs_the_layers_by_itself_is_the_kernels(base_folder):
    model = MolexModel.from_pretrained(base_folder("roberta"))
    model.prepack()
    assert model.on_kernels
    assert model.runs_on == "the kernels"
