"""Running generations, one new token each: planned once for as long as the same ones run."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch

from molex.adapter import Adapter
from molex.backbone import Backbone
from molex.forward import Forward
from molex.grouped.decoding import GroupedDecoding
from molex.grouped.layers import GroupedLayers
from molex.kv_cache import KVCache
from molex.lora import BatchLora
from molex.native.decoding import NativeDecoding
from molex.native.layers import NativeLayers
from molex.passes import RunOutput, RunStats
from molex.routing import Router
from molex.row import Row


def can_decode(backbone: Backbone) -> bool:
    """Whether all layers of a base can run one after the other as one piece of work, with one attention."""
    return isinstance(backbone.layers, NativeLayers | GroupedLayers) and backbone.layers_share_attention


def is_decoding(row: Row) -> bool:
    """Whether a row is the next token of a generation whose route is known."""
    has_route = row.route is not None or not row.adapter.gates
    return len(row.token_ids) == 1 and row.start > 0 and row.adapter.head is None and has_route


class Decoding:
    """The next tokens of some running generations.

    Their routes are pinned and their pages taken, so between two steps of the same generations nothing
    changes but tokens and positions. What runs at each depth is what a `Forward` over the rows would run.
    It holds neither the generations nor their adapters.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        adapters: Sequence[Adapter],
        lora: BatchLora,
        cache: KVCache,
        backbone: Backbone,
    ) -> None:
        forward = Forward(rows, adapters, lora, cache, backbone, "last")
        self._slots = [ref(row.slot) for row in rows if row.slot is not None]
        self._adapters = [ref(row.adapter) for row in rows]
        self._routes = [row.route for row in rows]
        self._order = forward.order
        self._backbone = backbone
        self._cache = ref(cache)
        self._stats, self._steps = _planned(forward, cache)

    def serves(self, rows: Sequence[Row], cache: KVCache) -> bool:
        """Whether these are the rows it was made for, some tokens on."""
        return (
            self._cache() is cache
            and [slot() for slot in self._slots] == [row.slot for row in rows]
            # The kernels read the factors where they lie: they must not be those of an adapter that is gone.
            and [adapter() for adapter in self._adapters] == [row.adapter for row in rows]
            and self._routes == [row.route for row in rows]
        )

    def step(self, rows: Sequence[Row]) -> RunOutput:
        """Run one token of each row; the results are those of `MolexModel.run`."""
        backbone = self._backbone
        ordered = [rows[i] for i in self._order]
        ids, starts = [row.token_ids[0] for row in ordered], [row.start for row in ordered]
        tokens, past = torch.tensor([ids, starts]).to(backbone.device).unbind()
        hidden = backbone.embed(tokens, past, None)
        hidden = self._steps.step(hidden, past, backbone.rotary(hidden, past))
        assert backbone.lm_head is not None
        logits = backbone.lm_head(backbone.final_norm(hidden))
        places = sorted(range(len(rows)), key=self._order.__getitem__)
        routes = [row.route or () for row in rows]
        return RunOutput([logits[i] for i in places], routes, torch.zeros(()), self._stats)


def _steps(backbone: Backbone, count: int) -> NativeDecoding | GroupedDecoding:
    layers, head_dim, options = backbone.layers, backbone.head_dim, backbone.attention_options
    if isinstance(layers, GroupedLayers):
        return GroupedDecoding(layers, head_dim, options)
    assert isinstance(layers, NativeLayers)
    return NativeDecoding(layers, count, backbone.num_heads, head_dim, options)


def _planned(forward: Forward, cache: KVCache) -> tuple[RunStats, NativeDecoding | GroupedDecoding]:
    backbone, layout = forward.backbone, forward.packed
    count = len(layout)
    steps = _steps(backbone, count)
    pinned = [row.route or () for row in forward.rows]
    # Grouped passes visit the own layer too, and leave keys and values for that visit.
    visits_own = isinstance(steps, GroupedDecoding)
    router = Router(forward.adapters, layout, [1] * count, pinned, visits_own=visits_own)
    distinct_layers = 0
    for depth in range(backbone.num_layers):
        plan = router.plan(depth, torch.empty(0))
        distinct_layers += sum(layer != depth for layer, _, _ in plan.groups)
        [calls] = forward.calls(depth, plan)
        arranged = forward.arranged(calls)
        numbers = [call.layer for call in calls]
        steps.add_depth(arranged.stage, numbers, arranged.pages, cache.depths[depth], plan)
    return RunStats(count, len(forward.adapters), distinct_layers), steps
