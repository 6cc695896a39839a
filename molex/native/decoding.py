"""Steps of running generations on the kernels: all depths, and all adapters in them, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molex.attention import AttentionOptions
from molex.kv_cache import DepthCache
from molex.native.layers import NativeLayers
from molex.packing import Indices
from molex.plan import RoutePlan
from molex.stage import Stage


class NativeDecoding:
    """What `count` running generations go through for their next token, depth by depth."""

    def __init__(
        self, layers: NativeLayers, count: int, num_heads: int, head_dim: int, options: AttentionOptions
    ) -> None:
        self._layers = layers
        self._steps = torch.classes.molex.Decoding(
            layers.packed,
            count,
            num_heads,
            options.num_kv_heads,
            head_dim,
            options.scaling,
            options.window or 0,
        )

    def add_depth(
        self, stage: Stage, numbers: Sequence[int], pages: Indices, cache: DepthCache, plan: RoutePlan
    ) -> None:
        """The next depth: its layer calls, of which the first is the own layer on all rows.

        `pages` [places, p] are those of the stream that each place of the stage writes and reads.
        """
        mixing = []
        if plan.own is not None and plan.weights is not None:
            mixing = [plan.own.float(), torch.from_numpy(plan.requests), plan.weights.float()]
        self._steps.add(
            numbers,
            stage.counts,
            stage.tokens,
            stage.runs_side_by_side,
            self._layers.factors_of(stage.lora),
            torch.from_numpy(pages),
            cache.pages,
            mixing,
        )

    def step(self, hidden: Tensor, past: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Embeddings [n, d] of one new token each, `past` [n] tokens being cached → the last outputs.

        `rotary` is (cos, sin) [n, head_dim] for families that rotate queries and keys.
        """
        cos, sin = (torch.empty(0), torch.empty(0)) if rotary is None else rotary
        output: Tensor = self._steps.step(hidden, past, cos.float().contiguous(), sin.float().contiguous())
        return output
