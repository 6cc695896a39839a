"""The packed forward: one base model, many adapters, one batch.

Training, offline use and serving all run `MolexModel.run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from molex.adapter import BARE, Adapter
from molex.adapter_file import read_adapter
from molex.attention import KVStreams
from molex.backbone import Backbone, BaseSpec
from molex.errors import InputError
from molex.kv_cache import KVCache
from molex.lora import ActiveLora, BatchLora
from molex.packing import Packed
from molex.routing import Route, RouteGroup, Router, flat_route


@dataclass
class Row:
    """One request's part of a packed batch.

    `token_ids` are the tokens to run now. The first `voters` of them decide the route (None: all of them),
    unless `route` pins it. A generation has a cache `slot`, in which `start` earlier tokens are kept.
    """

    token_ids: Sequence[int]
    adapter: Adapter = BARE
    voters: int | None = None
    token_type_ids: Sequence[int] | None = None
    slot: int | None = None
    start: int = 0
    route: Route | None = None


@dataclass(frozen=True)
class RunStats:
    """What one forward pass was made of; `distinct_layers` counts routed layers, summed over depths."""

    tokens: int
    distinct_adapters: int
    distinct_layers: int


@dataclass(frozen=True)
class RunOutput:
    """The results of a forward pass, in the order of its rows.

    `logits[i]` is [num_labels] for a classification adapter, [vocab] or [tokens, vocab] for a causal language
    model, and the last hidden states [tokens, d] for the bare encoder. `balance_loss` is the load-balance
    loss averaged over the votes of the pass, 0 where none was held or no gradient is taken.
    """

    logits: list[Tensor]
    routes: list[Route]
    balance_loss: Tensor
    stats: RunStats


@dataclass(frozen=True)
class ModelOutput:
    """`logits[i]` as in `RunOutput`; `routes[i]` lists the layer chosen at each mixed depth of request i."""

    logits: list[Tensor]
    routes: list[list[int | tuple[int, ...]]]


@dataclass
class _Batch:
    """Rows ordered by adapter, and all that the layers need to know of them."""

    rows: list[Row]
    order: list[int]
    adapters: list[Adapter]
    packed: Packed
    lora: BatchLora
    rotary: tuple[Tensor, Tensor] | None
    cache: KVCache | None


class MolexModel:
    """A base model, loaded once, and the adapters that are resident on it."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._adapters: dict[str, Adapter] = {}
        self._batch_lora = BatchLora([])

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> MolexModel:
        """Load a BERT, RoBERTa, GPT-2, Llama, Mistral or Qwen2 model from a local folder or hub id.

        Raises BaseModelError, which names the base and what is wrong with it.
        """
        return cls(Backbone.from_pretrained(base, dtype, device))

    def prepack(self) -> None:
        """Lay the base's weights out for speed where the CPU gains from it; no training afterwards."""
        self.backbone.prepack()

    @property
    def spec(self) -> BaseSpec:
        return self.backbone.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The resident adapters by name, read-only."""
        return MappingProxyType(self._adapters)

    def load_adapter(self, name: str, folder: str | Path) -> Adapter:
        """Read a MoLEx or PEFT LoRA folder and keep it under a name, replacing what had it.

        Raises AdapterError, which names the tensor or field at fault; nothing is replaced then.
        """
        adapter = read_adapter(folder, self.spec, self.dtype, self.device)
        self._adapters[name] = adapter
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InputError if there is none of that name."""
        if self._adapters.pop(name, None) is None:
            raise InputError(f"adapter {name!r} is not loaded")
        self._batch_lora = BatchLora([])

    def new_cache(self, num_slots: int, max_length: int) -> KVCache:
        """A key-value cache for `num_slots` running generations of at most `max_length` tokens each."""
        return KVCache(
            num_slots,
            max_length,
            num_layers=self.spec.num_layers,
            num_heads=self.backbone.num_kv_heads,
            head_dim=self.backbone.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def __call__(
        self,
        input_ids: Sequence[Sequence[int]],
        adapters: Sequence[str | None] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        token_type_ids: Sequence[Sequence[int]] | None = None,
    ) -> ModelOutput:
        """Run requests of any lengths through any mix of resident adapters; None is the bare base.

        The first `prompt_lengths[i]` tokens of request i vote on its route, by default all of them. Takes no
        gradients. Raises InputError that names the request and what is wrong with it.
        """
        count = len(input_ids)
        names = [None] * count if adapters is None else adapters
        voters: Sequence[int | None] = [None] * count if prompt_lengths is None else prompt_lengths
        types: Sequence[Sequence[int] | None] = [None] * count if token_type_ids is None else token_type_ids
        given = {"adapters": names, "prompt_lengths": voters, "token_type_ids": types}
        for argument, values in given.items():
            if len(values) != count:
                raise InputError(f"{argument}: {len(values)} given for {count} requests")
        for number, ids in enumerate(input_ids):
            if not all(isinstance(token, int) for token in ids):
                raise InputError(f"request {number}: a token id is not a whole number")
        rows = [
            Row(ids, self._resident(name), voters=n, token_type_ids=t)
            for ids, name, n, t in zip(input_ids, names, voters, types, strict=True)
        ]
        with torch.no_grad():
            output = self.run(rows, lm_logits="all")
        return ModelOutput(output.logits, [flat_route(route) for route in output.routes])

    def _resident(self, name: str | None) -> Adapter:
        if name is None:
            return BARE
        if name not in self._adapters:
            raise InputError(f"adapter {name!r} is not loaded")
        return self._adapters[name]

    def run(
        self,
        rows: Sequence[Row],
        cache: KVCache | None = None,
        lm_logits: Literal["last", "all"] = "last",
    ) -> RunOutput:
        """The packed forward over requests of any adapters, lengths and stages.

        Takes gradients where the caller enables them. `cache` keeps keys and values of the rows that have a
        slot. `lm_logits` chooses between the next-token logits and those of every token.
        """
        if not rows:
            return RunOutput([], [], torch.zeros(()), RunStats(0, 0, 0))
        for number, row in enumerate(rows):
            self._check(number, row, cache)
        batch = self._pack(rows, cache)
        packed = batch.packed
        voters = [len(row.token_ids) if row.voters is None else row.voters for row in batch.rows]
        router = Router(batch.adapters, packed, voters, [row.route for row in batch.rows])
        hidden = self._embed(batch)
        batch.rotary = self.backbone.rotary(hidden, packed.positions)
        distinct_layers = 0
        for depth in range(self.spec.num_layers):
            plan = router.plan(depth, hidden[0])
            own = self._run_own(batch, depth, hidden)
            if plan is None:
                hidden = own
                continue
            distinct_layers += len(plan.groups)
            # Mixed in at least float32: 0.95 and 0.05 rounded to bfloat16 no longer sum to 1.
            mixed = own[0].to(plan.own.dtype) * packed.spread(plan.own)[:, None]
            for group in plan.groups:
                self._add_routed(mixed, batch, depth, group, hidden)
            hidden = mixed.to(hidden.dtype)[None]
        logits = self._logits(batch, hidden[0], lm_logits)
        routes, losses = router.routes, router.balance_losses
        inverse = sorted(range(len(rows)), key=batch.order.__getitem__)
        return RunOutput(
            [logits[i] for i in inverse],
            [routes[i] for i in inverse],
            torch.stack(losses).mean() if losses else torch.zeros((), device=self.device),
            RunStats(packed.num_tokens, len(batch.adapters), distinct_layers),
        )

    def _check(self, number: int, row: Row, cache: KVCache | None) -> None:
        """Refuse what would make the embedding or the cache fail for the whole batch."""
        length, limit = row.start + len(row.token_ids), self.spec.max_length
        if not len(row.token_ids):
            raise InputError(f"request {number}: no tokens")
        if length > limit:
            raise InputError(f"request {number}: {length} tokens, but the base model takes at most {limit}")
        if not 0 <= min(row.token_ids) <= max(row.token_ids) < self.spec.vocab_size:
            raise InputError(f"request {number}: a token id is not in 0..{self.spec.vocab_size - 1}")
        if row.voters is not None and not 1 <= row.voters <= len(row.token_ids):
            raise InputError(f"request {number}: {row.voters} of {len(row.token_ids)} tokens cannot vote")
        if row.start and row.slot is None:
            raise InputError(
                f"request {number}: {row.start} earlier tokens, but no cache slot that holds them"
            )
        if row.start and row.adapter.gates and row.route is None:
            raise InputError(f"request {number}: the route of its {row.start} earlier tokens is not pinned")
        if row.slot is not None and (cache is None or length > cache.max_length):
            raise InputError(f"request {number}: {length} tokens do not fit its cache slot")
        if row.token_type_ids is not None:
            self._check_types(number, row.token_type_ids, len(row.token_ids))

    def _check_types(self, number: int, types: Sequence[int], length: int) -> None:
        if not self.spec.token_types:
            raise InputError(f"request {number}: {self.spec.model_type} has no token types")
        if len(types) != length:
            raise InputError(f"request {number}: {len(types)} token types for {length} tokens")
        if not 0 <= min(types) <= max(types) < self.spec.token_types:
            raise InputError(f"request {number}: a token type is not in 0..{self.spec.token_types - 1}")

    def _pack(self, rows: Sequence[Row], cache: KVCache | None) -> _Batch:
        """Order the rows by adapter, so that each adapter's tokens are neighbours."""
        adapters = list({id(row.adapter): row.adapter for row in rows}.values())
        member_of = {id(adapter): n for n, adapter in enumerate(adapters)}
        order = sorted(range(len(rows)), key=lambda i: member_of[id(rows[i].adapter)])
        ordered = [rows[i] for i in order]
        packed = Packed(
            [len(row.token_ids) for row in ordered],
            [row.start for row in ordered],
            [member_of[id(row.adapter)] for row in ordered],
            causal=self.backbone.family.causal,
            device=self.device,
        )
        return _Batch(ordered, order, adapters, packed, self._lora_of(adapters), None, cache)

    def _lora_of(self, adapters: list[Adapter]) -> BatchLora:
        """Keep the last batch's stacked factors: a decoding step has the adapters of the one before."""
        weights = [adapter.lora for adapter in adapters]
        kept = self._batch_lora.adapters
        if len(kept) != len(weights) or any(a is not b for a, b in zip(kept, weights, strict=True)):
            self._batch_lora = BatchLora(weights)
        return self._batch_lora

    def _embed(self, batch: _Batch) -> Tensor:
        ids = [token for row in batch.rows for token in row.token_ids]
        tokens = torch.tensor(ids, device=self.device)
        types = None
        if any(row.token_type_ids is not None for row in batch.rows):
            flat = [t for row in batch.rows for t in row.token_type_ids or [0] * len(row.token_ids)]
            types = torch.tensor(flat, device=self.device)
        return self.backbone.embed(tokens, batch.packed.positions, types)

    def _run_own(self, batch: _Batch, depth: int, hidden: Tensor) -> Tensor:
        """L_depth(hidden) on all rows."""
        kv = self._streams(batch, depth, range(len(batch.packed)), None)
        return self._run_layer(batch, depth, hidden, batch.packed, batch.rotary, kv)

    def _add_routed(
        self, mixed: Tensor, batch: _Batch, depth: int, group: RouteGroup, hidden: Tensor
    ) -> None:
        """mixed[tokens of the group] += weight · L_layer(hidden[tokens of the group])."""
        packed = batch.packed.subset(group.requests)
        tokens = batch.packed.tokens(group.requests)
        rotary = batch.rotary and (
            batch.rotary[0].index_select(1, tokens),
            batch.rotary[1].index_select(1, tokens),
        )
        kv = self._streams(batch, depth, group.requests, group.choices)
        routed = self._run_layer(batch, group.layer, hidden.index_select(1, tokens), packed, rotary, kv)[0]
        mixed.index_add_(0, tokens, routed.to(mixed.dtype) * packed.spread(group.weights)[:, None])

    def _run_layer(
        self,
        batch: _Batch,
        layer: int,
        hidden: Tensor,
        packed: Packed,
        rotary: tuple[Tensor, Tensor] | None,
        kv: KVStreams | None,
    ) -> Tensor:
        lora = ActiveLora(batch.lora, packed) if batch.lora.updates else None
        return self.backbone.run_layer(layer, hidden, packed, lora, rotary, kv)

    def _streams(
        self, batch: _Batch, depth: int, requests: Sequence[int], choices: Sequence[int] | None
    ) -> KVStreams | None:
        """Where the requests keep keys and values at a depth: own streams, or those of routed choices."""
        if batch.cache is None:
            return None
        streams: list[int | None] = []
        for n, i in enumerate(requests):
            slot, choice = batch.rows[i].slot, 0 if choices is None else choices[n]
            streams.append(None if slot is None else batch.cache.stream(slot, choice))
        return KVStreams(batch.cache.depths[depth], streams)

    def _logits(self, batch: _Batch, hidden: Tensor, lm_logits: str) -> list[Tensor]:
        """Heads on the pooled tokens, the language model head or the bare hidden states on the others."""
        hidden = self.backbone.final_norm(hidden)
        results: dict[int, Tensor] = {}
        generated: list[int] = []
        offsets = batch.packed.offsets
        for member, adapter in enumerate(batch.adapters):
            requests = [i for i, m in enumerate(batch.packed.members) if m == member]
            if adapter.head is not None:
                at = [offsets[i] if adapter.head.pools_first_token else offsets[i + 1] - 1 for i in requests]
                results |= zip(requests, adapter.head.logits(hidden[at], self.backbone.pooler), strict=True)
            elif self.backbone.lm_head is None:
                results |= {i: hidden[offsets[i] : offsets[i + 1]] for i in requests}
            else:
                generated += requests
        if generated:
            results |= self._lm_logits(batch.packed, hidden, generated, lm_logits)
        return [results[i] for i in range(len(batch.rows))]

    def _lm_logits(
        self, packed: Packed, hidden: Tensor, requests: list[int], lm_logits: str
    ) -> dict[int, Tensor]:
        assert self.backbone.lm_head is not None
        if lm_logits == "last":
            ends = [packed.offsets[i + 1] - 1 for i in requests]
            return dict(zip(requests, self.backbone.lm_head(hidden[ends]), strict=True))
        logits = self.backbone.lm_head(hidden[packed.tokens(requests)])
        return dict(zip(requests, logits.split([packed.lengths[i] for i in requests]), strict=True))
