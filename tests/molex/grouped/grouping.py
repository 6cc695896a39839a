"""What tests of grouped products share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from molex import MolexModel, backbone, backends
from molex.adapter import Adapter, assemble
from molex.native import build

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)


def grouped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> MolexModel:
    """A model whose layers run as on a GPU."""
    with monkeypatch.context() as patch:
        if device == "meta":
            patch.setattr(backbone, "_digest", lambda model: "sha256:none")
        model = MolexModel.from_pretrained(folder, dtype, device)
        patch.setattr(build, "why_not", lambda dtype, device: "are not used here")
        patch.setattr(backends, "can_group", lambda stock: True)
        model.prepack()
    return model


def moved(adapter: Adapter, model: MolexModel) -> Adapter:
    """The adapter on a model's device."""
    tensors = {name: tensor.to(model.device) for name, tensor in adapter.tensors.items()}
    return assemble(adapter.config, model.spec, tensors, digest=adapter.digest)


class NoWaiting(TorchDispatchMode):
    """Fails where an operation has tensors of several devices, or brings one from the device to the host.

    For tensors on the meta device, which has shapes alone: what depends on values fails there anyway.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {str(tensor.device) for tensor in tensors if tensor.dim()}
        assert len(devices) <= 1 or func in COPIES, f"{func} of tensors on {devices}"
        output = func(*args, **(kwargs or {}))
        if func in COPIES and output.device.type == "cpu":
            assert devices == {"cpu"}, f"{func} waits for the device"
        return output


class Operations(TorchDispatchMode):
    """Counts what a device would be asked to do: operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
