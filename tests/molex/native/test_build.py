"""Compiling the kernels, and doing without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molex import MolexModel
from molex.errors import BaseModelError
from molex.layers import StockLayers
from molex.native import build
from tests.molex.native.kernels import CPU, needs_kernels

OF_PRODUCTS = [Path(__file__).with_name(f"test_{name}.py") for name in ("layers", "decoding", "vocabulary")]


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
    assert "#error this is no kernel" in build.load()


def test_a_compiler_that_fails_in_silence_is_told_of(fresh_cache, monkeypatch):
    monkeypatch.setattr(build, "COMPILER", "false")
    assert build.load() == "could not be built: false failed: it ended with 1"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_run_on_pytorch(dtype):
    assert build.why_not(dtype, CPU) is not None


def test_an_older_cpu_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert build.why_not(torch.float32, CPU) == "need a CPU with AVX2"


def test_other_instructions_are_another_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda output: output.touch())
    paths = set()
    for capability in build.INSTRUCTIONS:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        paths.add(build.library())
    assert len(paths) == len(build.INSTRUCTIONS)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="here the other tests run what this one would"
)
def test_kernels_without_avx512_pass_the_same_tests():
    """Beside AVX-512 in one process they would register under the same names."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, OF_PRODUCTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_who_asks_for_the_kernels_gets_nothing_else(base_folder, monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda dtype, device: "need a CPU with AVX2")
    model = MolexModel.from_pretrained(base_folder("roberta"))
    with pytest.raises(BaseModelError, match="cannot run the layers: they need a CPU with AVX2"):
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
    assert model.runs_on in ("the kernels, as this CPU has AVX2", "the kernels, as this CPU has AVX512")
