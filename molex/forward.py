"""One packed forward pass, depth by depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from molex.adapter import Adapter
from molex.attention import KVStreams
from molex.backbone import Backbone, LayerCall
from molex.kv_cache import KVCache
from molex.lora import ActiveLora, BatchLora
from molex.packing import Packed
from molex.routing import RouteGroup, RoutePlan
from molex.row import Row


class Forward:
    """Rows ordered by adapter, so that each adapter's tokens are neighbours.

    `adapters` are the distinct ones, `order[i]` is the place of row i among the rows that were given.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        adapters: Sequence[Adapter],
        lora: BatchLora,
        cache: KVCache | None,
        backbone: Backbone,
        lm_logits: Literal["last", "all"],
    ) -> None:
        member_of = {id(adapter): n for n, adapter in enumerate(adapters)}
        self.order = sorted(range(len(rows)), key=lambda i: member_of[id(rows[i].adapter)])
        self.rows = [rows[i] for i in self.order]
        self.adapters = adapters
        self.cache = cache
        self.backbone = backbone
        self.packed = Packed(
            [len(row.token_ids) for row in self.rows],
            [row.start for row in self.rows],
            [member_of[id(row.adapter)] for row in self.rows],
            causal=backbone.family.causal,
            device=backbone.device,
        )
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._everyone = range(len(rows))
        self._needed = [self._needed_tokens(row, lm_logits) for row in self.rows]
        self._result = Packed(
            [len(tokens) for tokens in self._needed],
            [0] * len(rows),
            self.packed.members,
            causal=False,
            device=backbone.device,
        )
        self._lora = lora
        self._own_lora = self._active(self.packed, self._everyone)

    def _needed_tokens(self, row: Row, lm_logits: str) -> range:
        """The tokens of a request whose last hidden states someone looks at."""
        length, head = len(row.token_ids), row.adapter.head
        if head is not None:
            return range(1) if head.pools_first_token else range(length - 1, length)
        if self.backbone.lm_head is not None and lm_logits == "last":
            return range(length - 1, length)
        return range(length)

    def _active(self, packed: Packed, requests: Sequence[int]) -> ActiveLora | None:
        return ActiveLora(self._lora, packed.segments(requests)) if self._lora.updates else None

    def _call(self, layer: int, requests: Sequence[int], tokens: Tensor | None, *, last: bool) -> LayerCall:
        lora = self._own_lora if tokens is None else self._active(self.packed, requests)
        if not last or self._result.num_tokens == self.packed.num_tokens:
            return LayerCall(layer, tokens, lora)
        starts = accumulate((self.packed.lengths[i] for i in requests), initial=0)
        needed = [start + j for start, i in zip(starts, requests, strict=False) for j in self._needed[i]]
        rows = torch.tensor(needed, device=self.backbone.device)
        return LayerCall(layer, tokens, lora, rows, self._active(self._result, requests))

    def embed(self) -> Tensor:
        """The input [n, d] of depth 0."""
        backbone = self.backbone
        ids = [token for row in self.rows for token in row.token_ids]
        tokens = torch.tensor(ids, device=backbone.device)
        types = None
        if any(row.token_type_ids is not None for row in self.rows):
            flat = [t for row in self.rows for t in row.token_type_ids or [0] * len(row.token_ids)]
            types = torch.tensor(flat, device=backbone.device)
        hidden = backbone.embed(tokens, self.packed.positions, types)
        self._rotary = backbone.rotary(hidden, self.packed.positions)
        return hidden

    def run_depth(self, depth: int, plan: RoutePlan, hidden: Tensor) -> Tensor:
        """z' = own · L_t(z) + Σ_groups weights · L_layer(z), for z [n, d].

        The last depth returns only the rows of tokens whose result is needed, in their order.
        """
        last = depth == len(self.backbone.layers) - 1
        own, *routed = self._run_layers(depth, plan.groups, hidden, last=last)
        return own if plan.own is None else _mixed(self._result if last else self.packed, plan, own, routed)

    def _run_layers(
        self, depth: int, groups: Sequence[RouteGroup], hidden: Tensor, *, last: bool
    ) -> list[Tensor]:
        """L_t on all tokens, then the layer of each group on the tokens of its requests."""
        calls = [self._call(depth, self._everyone, None, last=last)]
        calls += [
            self._call(group.layer, group.requests, self.packed.tokens(group.requests), last=last)
            for group in groups
        ]
        visits = [[(i, 0) for i in self._everyone]]
        visits += [list(zip(group.requests, group.choices, strict=True)) for group in groups]
        if self.backbone.layers_share_attention:
            return self._run_together(depth, calls, visits, hidden)
        return [
            self._run_together(depth, [call], [visit], hidden)[0]
            for call, visit in zip(calls, visits, strict=True)
        ]

    def _run_together(
        self,
        depth: int,
        calls: Sequence[LayerCall],
        visits: Sequence[Sequence[tuple[int, int]]],
        hidden: Tensor,
    ) -> list[Tensor]:
        """Run layers with one attention over all their rows.

        `visits` lists, for each call, its requests and which choice of theirs it is (0: the own layer).
        """
        packed, rotary = self.packed, self._rotary
        requests = [i for visit in visits for i, _ in visit]
        if requests != list(self._everyone):
            packed = self.packed.subset(requests)
            if rotary is not None:
                tokens = self.packed.tokens(requests)
                rotary = rotary[0].index_select(0, tokens), rotary[1].index_select(0, tokens)
        kv = None
        if self.cache is not None:
            streams = [self._stream(i, choice) for visit in visits for i, choice in visit]
            kv = KVStreams(self.cache.depths[depth], streams)
        return self.backbone.run_layers(calls, hidden, packed, rotary, kv)

    def _stream(self, request: int, choice: int) -> int | None:
        """Where a request keeps keys and values of its own or a routed layer."""
        slot = self.rows[request].slot
        return None if slot is None or self.cache is None else self.cache.stream(slot, choice)

    def logits(self, hidden: Tensor, lm_logits: Literal["last", "all"]) -> list[Tensor]:
        """From the output of the last depth to the logits of each request, as in `RunOutput`.

        Heads on the pooled tokens, the language model head or the bare hidden states on the others.
        """
        hidden = self.backbone.final_norm(hidden)
        results: dict[int, Tensor] = {}
        generated: list[int] = []
        offsets = self._result.offsets
        for member, adapter in enumerate(self.adapters):
            requests = [i for i, m in enumerate(self._result.members) if m == member]
            if adapter.head is not None:
                pooled = hidden[[offsets[i] for i in requests]]
                results |= zip(requests, adapter.head.logits(pooled, self.backbone.pooler), strict=True)
            elif self.backbone.lm_head is None:
                results |= {i: hidden[offsets[i] : offsets[i + 1]] for i in requests}
            else:
                generated += requests
        if generated:
            results |= self._lm_logits(hidden, generated, lm_logits)
        return [results[i] for i in range(len(self.rows))]

    def _lm_logits(self, hidden: Tensor, requests: list[int], lm_logits: str) -> dict[int, Tensor]:
        assert self.backbone.lm_head is not None
        logits = self.backbone.lm_head(hidden[self._result.tokens(requests)])
        pieces = logits if lm_logits == "last" else logits.split([self._result.lengths[i] for i in requests])
        return dict(zip(requests, pieces, strict=True))


def _mixed(packed: Packed, plan: RoutePlan, own: Tensor, routed: Sequence[Tensor]) -> Tensor:
    """z' [n, d] = own · L_t(z) + Σ_groups weights · L_layer(z), from the outputs of the layers."""
    assert plan.own is not None
    # In at least float32: 0.95 and 0.05 rounded to bfloat16 no longer sum to 1.
    mixed = own.to(plan.own.dtype) * packed.spread(plan.own)[:, None]
    if not plan.groups:
        return mixed.to(own.dtype)
    # Gathered by token: adding at tokens goes row by row. Requests without a group get zeros.
    rows = torch.cat([*routed, own.new_zeros(1, own.shape[1])])
    weights = torch.cat([*(group.weights for group in plan.groups), plan.own.new_zeros(1)])
    requests = [i for group in plan.groups for i in group.requests]
    choices = [choice for group in plan.groups for choice in group.choices]
    starts = list(accumulate((packed.lengths[i] for i in requests), initial=0))
    for choice in range(1, max(choices) + 1):
        entries, shifts = [len(requests)] * len(packed), [0] * len(packed)
        for n, i in enumerate(requests):
            if choices[n] == choice:
                entries[i], shifts[i] = n, starts[n] - packed.offsets[i]
        entry, shift = packed.spread(torch.tensor([entries, shifts], device=own.device).T).unbind(1)
        tokens = torch.arange(packed.num_tokens, device=own.device)
        row = torch.where(entry < len(requests), tokens + shift, len(rows) - 1)
        mixed = mixed + rows.index_select(0, row).to(mixed.dtype) * weights[entry][:, None]
    return mixed.to(own.dtype)
