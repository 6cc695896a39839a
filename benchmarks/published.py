"""MoLEx the way its published code runs it: padded batches that vote as a whole, stock layers, float32.

Written from docs/method.md ("What differs from the official code"), not from that code. One adapter at a
time is in the model. At each mixed depth all tokens of the padded batch, padding included, choose one layer;
the depth's own layer and the chosen one run on the whole padded batch, with transformers' eager attention
and its mask. Low-rank updates are two plain products beside each adapted linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from molex.adapter import Adapter
from molex.family import FAMILIES
from molex.lora import LowRank


class LoraLinear(nn.Module):
    """W x + b + s · B A x, with the factors of the adapter that is in the model."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.update: LowRank | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.update is None:
            return y
        return y + (x @ self.update.a.T) @ self.update.b.T * self.update.scaling


class PublishedModel:
    """A RoBERTa or BERT base in float32 with one classification adapter at a time."""

    def __init__(self, base: str | Path) -> None:
        model: Any = AutoModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        self.embeddings = model.embeddings
        self.padding: int = model.config.pad_token_id
        self.layers: list[Any] = list(attrgetter(FAMILIES[model.config.model_type].layers)(model))
        self.adapter: Adapter | None = None
        self._adapted: list[LoraLinear] = []

    def use(self, adapter: Adapter) -> None:
        """Put an adapter into the model, in place of the one before."""
        for linear in self._adapted:
            linear.update = None
        self._adapted = []
        for (layer, module), update in adapter.lora.updates.items():
            linear = self._wrapped(layer, module)
            linear.update = update
            self._adapted.append(linear)
        self.adapter = adapter

    def _wrapped(self, layer: int, name: str) -> LoraLinear:
        module = self.layers[layer].get_submodule(name)
        if not isinstance(module, LoraLinear):
            module = LoraLinear(module)
            self.layers[layer].set_submodule(name, module)
        return module

    def pad(self, inputs: Sequence[Sequence[int]]) -> Tensor:
        """Token ids [requests, longest], as `__call__` takes them."""
        longest = max(map(len, inputs))
        return torch.tensor([[*ids, *[self.padding] * (longest - len(ids))] for ids in inputs])

    @torch.inference_mode()
    def __call__(self, padded: Tensor) -> Tensor:
        """Logits [requests, labels] for padded token ids [requests, longest]."""
        adapter = self.adapter
        assert adapter is not None, "no adapter is in the model"
        assert adapter.head is not None, "the adapter classifies nothing"
        z = self.embeddings(input_ids=padded)
        mask = torch.zeros(padded.shape).masked_fill(padded == self.padding, torch.finfo(z.dtype).min)
        mask = mask[:, None, None]
        pairs = iter(adapter.mixing_pairs() if adapter.gates else ())
        for depth, layer in enumerate(self.layers):
            own = layer(z, mask)
            if depth in adapter.gates:
                w_own, w_routed = next(pairs)
                chosen = self._vote(adapter, depth, z)
                # Where a depth chooses its own layer this arm is spared the second run.
                routed = own if chosen == depth else self.layers[chosen](z, mask)
                own = w_own * own + w_routed * routed
            z = own
        return adapter.head.logits(z[:, 0])

    @staticmethod
    def _vote(adapter: Adapter, depth: int, z: Tensor) -> int:
        """The layer that most tokens of the padded batch z [requests, longest, d] choose."""
        requests, longest, _ = z.shape
        logits = adapter.gates[depth].logits(z.flatten(0, 1), [longest] * requests)
        return int(logits.argmax(-1).bincount(minlength=logits.shape[1]).argmax())
