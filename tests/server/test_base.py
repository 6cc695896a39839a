"""Bases are loaded onto the device that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from molex.errors import BaseModelError
from molex.export import export
from server.base import load_base
from server.settings import Settings


@pytest.mark.parametrize(("device", "found"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_not_there_is_named(device, found, base_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    settings = Settings(bases=[f"a={base_folder('bert')}"], device=device)
    with pytest.raises(BaseModelError, match=f"base 'a': there is no device {device}: .* finds {found} GPUs"):
        load_base("a", str(base_folder("bert")), settings)


def test_the_cpu_needs_no_looking_for(base_folder):
    settings = Settings(bases=[f"a={base_folder('bert')}"])
    assert load_base("a", str(base_folder("bert")), settings).model.device == torch.device("cpu")


def test_the_backend_that_is_asked_for_runs_the_layers(base_folder):
    folder = str(base_folder("bert"))
    model = load_base("a", folder, Settings(bases=[f"a={folder}"], backend="torch")).model
    assert not model.on_kernels
    assert model.runs_on.startswith("PyTorch")


def test_a_base_that_the_backend_cannot_run_is_named(base_folder):
    folder = str(base_folder("bert"))
    settings = Settings(bases=[f"a={folder}"], backend="kernels", precision="fp64")
    with pytest.raises(BaseModelError, match="base 'a': the kernels cannot run the layers: they "):
        load_base("a", folder, settings)


def test_an_exported_base_runs_as_it_was_exported(base_folder, tmp_path):
    folder = str(tmp_path / "exported")
    export(base_folder("bert"), Path(folder), "int8")
    model = load_base("a", folder, Settings(bases=[f"a={folder}"], precision="auto")).model
    assert model.runs_on == "ONNX Runtime, as exported in int8"
    with pytest.raises(BaseModelError, match="exported' was exported in int8: ask for that"):
        load_base("a", folder, Settings(bases=[f"a={folder}"]))
