"""The specification: MoLEx over one request, written the way the equations of `docs/method.md` are.

Slow on purpose. It shares the gates, the heads and the stock blocks of transformers with the engine, and
nothing else: attention is the eager one, low-rank updates are added into the weights, votes are counted in
Python, and there is neither a batch nor a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from molex.adapter import BARE, Adapter
from molex.config import MolexConfig
from molex.family import FAMILIES
from molex.routing import Choice, Route


class Reference:
    """A stock base model that runs one request of one adapter at a time."""

    def __init__(self, base: str | Path, dtype: torch.dtype = torch.float32) -> None:
        config = AutoConfig.from_pretrained(base)
        self.family = FAMILIES[config.model_type]
        loader: Any = AutoModelForCausalLM if self.family.causal else AutoModel
        model = loader.from_pretrained(base, dtype=dtype, attn_implementation="eager").eval()
        self.base = model.base_model
        self.lm_head = getattr(model, "lm_head", None)
        self.layers = list(attrgetter(self.family.layers)(self.base))

    @torch.no_grad()
    def __call__(
        self,
        token_ids: Sequence[int],
        adapter: Adapter = BARE,
        voters: int | None = None,
        route: Route | None = None,
        token_type_ids: Sequence[int] | None = None,
    ) -> tuple[Tensor, Route]:
        """Logits as in `molex.passes.RunOutput` (all tokens of a causal language model), and the route.

        The first `voters` tokens vote (None: all), unless a route is given.
        """
        tokens = torch.tensor([token_ids])
        positions = torch.arange(len(token_ids))[None]
        types = None if token_type_ids is None else torch.tensor([token_type_ids])
        z = self.family.embed(self.base, tokens, positions, types)
        options = [self._layer_options(block, z, positions) for block in self.layers]
        choices: list[Choice] = []
        for depth in range(len(self.layers)):
            own = self._run_layer(depth, z, adapter, options[depth])
            if depth not in adapter.gates:
                z = own
                continue
            molex, n = adapter.molex, len(choices)
            assert molex is not None
            choice = self._vote(adapter, depth, z[0, :voters]) if route is None else route[n]
            w_own, w_routed = adapter.mixing_pairs()[n].to(z.dtype)
            routed = torch.zeros_like(own)
            for layer, weight in zip(choice.layers, choice.weights, strict=True):
                routed += weight * self._run_layer(layer, z, adapter, options[layer])
            z = w_own * own + w_routed * routed
            choices.append(choice)
        return self._logits(z[0], adapter), tuple(choices)

    def _layer_options(self, block: Any, z: Tensor, positions: Tensor) -> dict[str, Any]:
        """A causal mask (0 and -inf, added to the scores) and rotations, where the family has them."""
        length = z.shape[1]
        options: dict[str, Any] = {"attention_mask": None}
        if self.family.causal:
            mask = torch.full((length, length), float("-inf"), dtype=z.dtype).triu(1)
            window = _window(block, self.base.config)
            if window is not None:
                mask += torch.full((length, length), float("-inf"), dtype=z.dtype).tril(-window)
            options["attention_mask"] = mask[None, None]
        if self.family.rotary:
            options["position_embeddings"] = self.base.rotary_emb(z, positions)
        return options

    def _run_layer(self, layer: int, z: Tensor, adapter: Adapter, options: dict[str, Any]) -> Tensor:
        """L(z) with W + s·B·A in place of each adapted weight W."""
        block = self.layers[layer]
        merged: dict[str, Tensor] = {}
        for (at, module), update in adapter.lora.updates.items():
            if at == layer:
                linear = block.get_submodule(module)
                change = update.scaling * (update.b @ update.a)
                merged[f"{module}.weight"] = linear.weight + (
                    change.T if isinstance(linear, Conv1D) else change
                )
        return functional_call(block, merged, (z,), options)  # type: ignore[no-any-return]

    def _vote(self, adapter: Adapter, depth: int, voting: Tensor) -> Choice:
        molex = adapter.molex
        assert molex is not None
        logits = adapter.gates[depth].logits(voting, [len(voting)])
        probabilities = logits.softmax(dim=-1).mean(dim=0).tolist()
        scores = _scores(logits, molex, probabilities)
        layers = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))[: molex.top_k]
        chosen = [probabilities[layer] for layer in layers]
        shares = [p / sum(chosen) if sum(chosen) else 1 / len(chosen) for p in chosen]
        return Choice(tuple(layers), tuple(shares))

    def _logits(self, hidden: Tensor, adapter: Adapter) -> Tensor:
        if self.family.norm is not None:
            hidden = getattr(self.base, self.family.norm)(hidden)
        if adapter.head is not None:
            pooled = hidden[:1] if adapter.head.pools_first_token else hidden[-1:]
            return adapter.head.logits(pooled, lambda rows: self.base.pooler(rows[:, None]))[0]
        return hidden if self.lm_head is None else self.lm_head(hidden)


def _window(block: Any, config: Any) -> int | None:
    """How many tokens a block sees back: Qwen2 sets it for each layer, Mistral for all."""
    own = getattr(block.self_attn, "sliding_window", None) if hasattr(block, "self_attn") else None
    return own or (config.sliding_window if config.model_type == "mistral" else None)


def _scores(logits: Tensor, molex: MolexConfig, probabilities: list[float]) -> list[float]:
    if molex.vote.rule == "mode":
        winners = logits.argmax(dim=-1).tolist()
        return [float(winners.count(layer)) for layer in range(logits.shape[1])]
    return probabilities if molex.vote.score == "softmax" else logits.sigmoid().mean(dim=0).tolist()
