"""Adapters whose answer always tells which one they are, whatever they are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from molex import read_adapter, write_adapter
from molex.adapter import PEFT_PREFIX
from molex.backbone import BaseSpec
from tests.tiny import random_adapter, relabel

OUTPUT = f"{PEFT_PREFIX}classifier.out_proj"


def write_named(spec: BaseSpec, folder: Path, count: int, *, rank: int = 2) -> dict[str, str]:
    """Write `count` classifiers into folders `v0`, `v1`, …; returns their digests by name.

    Their heads look at nothing: the label of each one's own name has all of the probability.
    """
    names = [f"v{number}" for number in range(count)]
    digests = {}
    for number, name in enumerate(names):
        adapter = relabel(random_adapter(spec, seed=100 + number, r=rank, num_labels=count), names)
        head = {
            f"{OUTPUT}.weight": torch.zeros_like(adapter.tensors[f"{OUTPUT}.weight"]),
            f"{OUTPUT}.bias": 50.0 * torch.eye(count)[number],
        }
        write_adapter(replace(adapter, tensors={**adapter.tensors, **head}), folder / name)
        digests[name] = read_adapter(folder / name, spec).digest
    return digests
