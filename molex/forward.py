"""One packed forward pass, depth by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from molex.adapter import Adapter
from molex.attention import KVPlan, KVStreams
from molex.backbone import Backbone
from molex.kv_cache import KVCache
from molex.lora import BatchLora
from molex.packing import Indices, Packed, ranges
from molex.plan import RoutePlan
from molex.row import Row
from molex.stage import Stage


@dataclass(frozen=True)
class LayerCall:
    """One layer at one depth, numbered as in `Layers`, and the requests that run through it.

    `choices[i]` says what the layer is to `requests[i]`: 0 its own, 1 or 2 its first or second choice.
    """

    layer: int
    requests: Indices
    choices: Indices


@dataclass(frozen=True)
class Arrangement:
    """The tokens of several layer calls side by side; the same at all depths where the requests are.

    `tokens` are their places in the batch; `packed` and `rotary` describe them, `stage` reads all of them.
    `pages` [r, n] are those of the stream of each request that a call runs, as `KVPlan` wants them.
    """

    tokens: Indices
    packed: Packed
    rotary: tuple[Tensor, Tensor] | None
    pages: Indices
    num_kv_heads: int
    stage: Stage

    @cached_property
    def kv(self) -> KVPlan | None:
        """Where keys and values are kept; None where no request keeps any."""
        return KVPlan(self.packed, self.pages, self.num_kv_heads) if (self.pages >= 0).any() else None


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
        self.rotary: tuple[Tensor, Tensor] | None = None
        self._everyone = np.arange(len(rows))
        needed = [self._needed_tokens(row, lm_logits) for row in self.rows]
        self.first_needed = np.array([tokens.start for tokens in needed])
        self.result = Packed(
            [len(tokens) for tokens in needed],
            np.zeros_like(self._everyone),
            self.packed.members,
            causal=False,
            device=backbone.device,
        )
        self.lora = lora
        self._arrangements: dict[tuple[bytes, ...], Arrangement] = {}
        self.pages = _page_table(self.rows)

    def _needed_tokens(self, row: Row, lm_logits: str) -> range:
        """The tokens of a request whose last hidden states someone looks at."""
        length, head = len(row.token_ids), row.adapter.head
        if head is not None:
            return range(1) if head.pools_first_token else range(length - 1, length)
        if self.backbone.lm_head is not None and lm_logits == "last":
            return range(length - 1, length)
        return range(length)

    def embed(self) -> Tensor:
        """The input of depth 0: [n, d], and rows of padding behind."""
        backbone = self.backbone
        count = self.packed.num_tokens
        tokens = self._tensor(_padded([count], [backbone.layers.padded_rows(count)]))
        ids = self._tensor([token for row in self.rows for token in row.token_ids])
        positions = self._tensor(self.packed.positions)
        types = None
        if any(row.token_type_ids is not None for row in self.rows):
            flat = [t for row in self.rows for t in row.token_type_ids or [0] * len(row.token_ids)]
            types = self._tensor(flat)[tokens]
        hidden = backbone.embed(ids[tokens], positions[tokens], types)
        self.rotary = backbone.rotary(hidden, positions)
        return hidden

    def run_depth(self, depth: int, plan: RoutePlan, hidden: Tensor) -> Tensor:
        """z' = own · L_t(z) + Σ_visits weight · L_layer(z), for the hidden states z [n, d].

        Behind the rows of the tokens z and z' have rows of padding, as many as `Backbone.padded_rows` wants.
        The last depth returns only the rows of tokens whose result is needed, in their order.
        """
        outputs = [
            output
            for calls in self.calls(depth, plan)
            for output in self.run_calls(depth, calls, [call.layer for call in calls], hidden)
        ]
        if plan.own is None:
            return outputs[0]
        return self.backbone.layers.mix(self.leaving(depth), plan, outputs)

    def is_last(self, depth: int) -> bool:
        return depth == self.backbone.num_layers - 1

    def leaving(self, depth: int) -> Packed:
        """The tokens that leave a depth: at the last one those whose result is needed."""
        return self.result if self.is_last(depth) else self.packed

    def calls(self, depth: int, plan: RoutePlan) -> list[list[LayerCall]]:
        """The own layer and the routed ones, those side by side that can share attention."""
        first_routed = self.backbone.layers.first_routed
        calls = [self.own_call(depth)]
        calls += [
            LayerCall(first_routed + layer, requests, choices) for layer, requests, choices in plan.groups
        ]
        return [calls] if self.backbone.layers_share_attention else [[call] for call in calls]

    def own_call(self, depth: int) -> LayerCall:
        """The own layer of a depth, which all requests run through."""
        return LayerCall(depth, self._everyone, np.zeros_like(self._everyone))

    def run_calls(
        self, depth: int, calls: Sequence[LayerCall], numbers: Any, hidden: Tensor
    ) -> Sequence[Tensor]:
        """The outputs of several layers, with one attention over all their rows.

        `numbers` are those of the layers, one a call, as the backbone's layers take them.
        """
        layers = self.backbone.layers
        arranged = self.arranged(calls)
        stage = arranged.stage
        projected = layers.project(stage, numbers, hidden)
        if self.is_last(depth) and self.result.num_tokens < self.packed.num_tokens:
            requests = np.concatenate([call.requests for call in calls])
            first = arranged.packed.offsets + self.first_needed[requests]
            needed = ranges(first, self.result.lengths[requests])
            stage = self._stage(calls, self.result, arranged.tokens, needed)
        kv = None
        if self.cache is not None and arranged.kv is not None:
            kv = KVStreams(self.cache.depths[depth], arranged.kv)
        attended = self.backbone.attend(
            calls[0].layer, projected, arranged.packed, arranged.rotary, kv, stage.rows
        )
        return layers.finish(stage, numbers, hidden, attended)

    def arranged(self, calls: Sequence[LayerCall]) -> Arrangement:
        """The tokens of calls that share attention."""
        key = tuple(indices.tobytes() for call in calls for indices in (call.requests, call.choices))
        if key not in self._arrangements:
            self._arrangements[key] = self._arrange(calls)
        return self._arrangements[key]

    def _arrange(self, calls: Sequence[LayerCall]) -> Arrangement:
        requests = np.concatenate([call.requests for call in calls])
        tokens = self.packed.tokens(requests)
        packed = self.packed if np.array_equal(requests, self._everyone) else self.packed.subset(requests)
        rotary = self.rotary
        if rotary is not None:
            at = self._tensor(tokens)
            rotary = rotary[0].index_select(0, at), rotary[1].index_select(0, at)
        stage = self._stage(calls, self.packed, tokens, np.arange(len(tokens)))
        pages = self.pages[requests, np.concatenate([call.choices for call in calls])]
        return Arrangement(tokens, packed, rotary, pages, self.backbone.num_kv_heads, stage)

    def _stage(
        self,
        calls: Sequence[LayerCall],
        layout: Packed,
        tokens: Indices,
        among: Indices,
    ) -> Stage:
        """Read the places `among` of the tokens side by side; `layout` says how many those are by request."""
        counts = [int(layout.lengths[call.requests].sum()) for call in calls]
        sizes = [self.backbone.layers.padded_rows(count) for count in counts]
        rows = among[_padded(counts, sizes)]
        runs = [layout.segments(call.requests) for call in calls]
        return Stage(rows, self._tensor(tokens[rows]), counts, sizes, runs, self.lora)

    def _tensor(self, values: Indices | list[int]) -> Tensor:
        return torch.as_tensor(values, device=self.backbone.device)

    def logits(self, hidden: Tensor, lm_logits: Literal["last", "all"]) -> list[Tensor]:
        """From the output of the last depth to the logits of each request, as in `RunOutput`.

        Heads on the pooled tokens, the language model head or the bare hidden states on the others.
        """
        hidden = self.backbone.final_norm(hidden)
        results: dict[int, Tensor] = {}
        generated: list[int] = []
        offsets, lengths = self.result.offsets.tolist(), self.result.lengths.tolist()
        for member, adapter in enumerate(self.adapters):
            requests = np.flatnonzero(self.result.members == member).tolist()
            if adapter.head is not None:
                pooled = hidden[[offsets[i] for i in requests]]
                results |= zip(requests, adapter.head.logits(pooled, self.backbone.pooler), strict=True)
            elif self.backbone.lm_head is None:
                results |= {i: hidden[offsets[i] : offsets[i] + lengths[i]] for i in requests}
            else:
                generated += requests
        if generated:
            results |= self._lm_logits(hidden, generated, lm_logits)
        return [results[i] for i in range(len(self.rows))]

    def _lm_logits(self, hidden: Tensor, requests: list[int], lm_logits: str) -> dict[int, Tensor]:
        assert self.backbone.lm_head is not None
        chosen = np.array(requests)
        logits = self.backbone.lm_head(hidden[self._tensor(self.result.tokens(chosen))])
        pieces = logits if lm_logits == "last" else logits.split(self.result.lengths[chosen].tolist())
        return dict(zip(requests, pieces, strict=True))


def _padded(counts: Sequence[int], sizes: Sequence[int]) -> Indices:
    """0, 1, …: as many as each count says, then the last of them again up to each size."""
    lengths = np.array(counts)
    return ranges(lengths.cumsum() - lengths, lengths, np.array(sizes))


def _page_table(rows: Sequence[Row]) -> Indices:
    """The pages [r, streams, n] of each row's slot, as `KVPlan` wants those of a stream."""
    slots = [row.slot for row in rows]
    streams = max(row.adapter.num_streams for row in rows)
    most = max((slot.pages.shape[1] for slot in slots if slot is not None), default=1)
    table = np.full((len(rows), streams, most), -1)
    for kept, slot in zip(table, slots, strict=True):
        if slot is not None:
            pages = slot.pages[:streams]
            kept[: len(pages), : pages.shape[1]] = pages
            kept[: len(pages), pages.shape[1] :] = pages[:, -1:]
    return table
