"""Fold a LoRA adapter into a copy of its base model: faster than the two, but a base of its own for each."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from molex.adapter import Adapter
from molex.adapter_file import read_adapter, write_adapter
from molex.backbone import Backbone
from molex.errors import MolexError
from molex.family import FAMILIES
from molex.folders import write_whole
from molex.lora import LoraWeights, LowRank
from molex.stock import load_stock
from molex.tokenizer import load_tokenizer


class MergeError(MolexError):
    """An adapter cannot be merged, or an output folder cannot be written."""


def merge(base: str | Path, adapter: str | Path, base_out: Path, output: Path | None = None) -> None:
    """Write the base with a LoRA adapter's updates added to its weights, W + scaling · B A, to `base_out`.

    The sum is taken in float64 and rounded to the precision that the base is saved in. What is left of a
    classification adapter, its head alone, becomes the adapter folder `output` on the new base. Raises
    MergeError, and BaseModelError or AdapterError for folders that would not load; nothing is left then.
    """
    spec = Backbone.from_pretrained(base).spec
    given = read_adapter(adapter, spec, dtype=torch.float64)
    _check(given, base_out, output)
    model, has_pooler = load_stock(base, "auto")
    if not has_pooler and hasattr(model, "pooler"):
        model.pooler = None  # Made up by transformers: the base has none.
    _add_updates(model, given)

    def write_base(folder: Path) -> None:
        model.save_pretrained(folder)
        load_tokenizer(base, spec).save_pretrained(folder)

    write_whole(base_out, write_base)
    if output is None:
        return
    head = _head_alone(read_adapter(adapter, spec), base_out)
    write_whole(output, lambda folder: write_adapter(head, folder))


def _check(adapter: Adapter, base_out: Path, output: Path | None) -> None:
    if adapter.molex is not None:
        raise MergeError("a MoLEx adapter cannot be merged: its layers depend on the input")
    if adapter.head is not None and output is None:
        raise MergeError("output: a folder is needed for the adapter's classification head")
    if adapter.head is None and output is not None:
        raise MergeError("output: nothing is left of an adapter for generation once it is merged")
    for name, folder in (("base_out", base_out), ("output", output)):
        if folder is not None and folder.exists():
            raise MergeError(f"{name}: {folder.name} exists already")


def _add_updates(model: PreTrainedModel, adapter: Adapter) -> None:
    family = FAMILIES[model.config.model_type]
    blocks = attrgetter(family.layers)(model.base_model)
    for (layer, name), update in adapter.lora.updates.items():
        _add_update(blocks[layer].get_submodule(name), update)


@torch.no_grad()
def _add_update(linear: nn.Module, update: LowRank) -> None:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    delta = update.scaling * (update.b @ update.a)
    # transformers' Conv1D keeps the transpose.
    weight.copy_(weight.double() + (delta if isinstance(linear, nn.Linear) else delta.T))


def _head_alone(adapter: Adapter, base: Path) -> Adapter:
    """The adapter without low-rank updates, on the base in a folder."""
    config = replace(adapter.config, target_modules=(), base_model_name_or_path=base.name)
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if ".lora_" not in name}
    return replace(adapter, config=config, tensors=tensors, lora=LoraWeights())
