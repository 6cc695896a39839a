"""Checkpoints of a training run: folders `checkpoint-<step>` inside the output folder.

A checkpoint holds `state.safetensors` (tensors) and `progress.json` (everything else). It is
written under another name, then renamed: a folder named `checkpoint-<step>` is always complete.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to continue: tensors by name, and JSON values by name."""

    tensors: Mapping[str, Tensor]
    progress: Mapping[str, Any]


def save_checkpoint(output: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of `step`, then remove all earlier ones."""
    output.mkdir(parents=True, exist_ok=True)
    draft = output / "checkpoint.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, draft / "state.safetensors")
    (draft / "progress.json").write_text(json.dumps(checkpoint.progress), encoding="utf-8")
    earlier = checkpoint_folders(output)
    target = output / f"checkpoint-{step:08d}"
    if target in earlier:
        earlier.remove(target)
        shutil.rmtree(target)
    draft.replace(target)
    for folder in earlier:
        shutil.rmtree(folder)


def load_checkpoint(output: Path) -> Checkpoint | None:
    """The latest checkpoint in the output folder, if there is one."""
    folders = checkpoint_folders(output)
    if not folders:
        return None
    progress = json.loads((folders[-1] / "progress.json").read_text(encoding="utf-8"))
    return Checkpoint(load_file(folders[-1] / "state.safetensors"), progress)


def remove_checkpoints(output: Path) -> None:
    """Remove every checkpoint of a finished run."""
    for folder in checkpoint_folders(output):
        shutil.rmtree(folder)


def checkpoint_folders(output: Path) -> list[Path]:
    """The complete checkpoints in the output folder, earliest first."""
    if not output.is_dir():
        return []
    return sorted(path for path in output.iterdir() if _NAME.fullmatch(path.name))


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names `<prefix>/<name>`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `<prefix>/`, without it."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
