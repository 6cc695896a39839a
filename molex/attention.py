"""Attention over packed rows, registered with transformers under the name `molex_packed`.

Stock transformer blocks hand their queries, keys and values to it, together with the keyword arguments
`packed` (where each request lies) and `kv` (where its earlier keys and values are kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from molex.kv_cache import DepthCache
from molex.packing import AttentionGroup, Packed

NAME = "molex_packed"


@dataclass(frozen=True)
class KVStreams:
    """Where the requests of a `Packed` keep keys and values: a stream of `cache` each, or None."""

    cache: DepthCache
    streams: Sequence[int | None]

    def write(self, packed: Packed, keys: Tensor, values: Tensor) -> None:
        """Append keys and values [n, heads, head_dim] of the packed tokens to their requests' streams."""
        kept = [i for i, stream in enumerate(self.streams) if stream is not None]
        if not kept:
            return
        positions = packed.positions
        if len(kept) < len(packed):
            tokens = packed.tokens(kept)
            keys, values, positions = keys[tokens], values[tokens], positions[tokens]
        streams = torch.tensor([self.streams[i] for i in kept], device=keys.device)
        lengths = torch.tensor([packed.lengths[i] for i in kept], device=keys.device)
        self.cache.write(streams.repeat_interleave(lengths), positions, keys, values)

    def read(self, group: AttentionGroup) -> tuple[Tensor, Tensor]:
        """Keys and values [b, heads, k, head_dim] of a group whose requests all have a stream."""
        streams = [self.streams[i] for i in group.requests]
        return self.cache.read([s for s in streams if s is not None], max(group.key_lengths))


def packed_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    packed: Packed,
    kv: KVStreams | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Each request attends to its own tokens and to nothing else.

    query [1, num_heads, n, head_dim], key and value [1, num_kv_heads, n, head_dim]; returns [1, n, num_heads,
    head_dim]. The mask argument of the blocks is unused: `packed` says who may see whom.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if kv is not None:
        kv.write(packed, key, value)
    outputs = []
    for group in packed.groups:
        queries = _gather(query, group)
        if any(group.past):
            assert kv is not None, "earlier tokens are in a cache"
            keys, values = kv.read(group)
        else:
            keys, values = _gather(key, group), _gather(value, group)
        mask = _mask(group, packed.causal, sliding_window, query.device)
        outputs.append(_scatter(_attend(queries, keys, values, mask, scaling), group))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if packed.restore is not None:
        output = output[packed.restore]
    return output[None], None


def _gather(rows: Tensor, group: AttentionGroup) -> Tensor:
    """[n, heads, head_dim] → [b, heads, q, head_dim]."""
    if group.bounds is not None:
        start, stop = group.bounds
        return rows[start:stop].view(*group.index.shape, *rows.shape[1:]).transpose(1, 2)
    return rows[group.index].transpose(1, 2)


def _scatter(attended: Tensor, group: AttentionGroup) -> Tensor:
    """[b, heads, q, head_dim] → the group's real tokens [m, heads, head_dim]."""
    rows = attended.transpose(1, 2).flatten(0, 1)
    return rows if group.flat is None else rows[group.flat]


def _mask(group: AttentionGroup, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys [b, 1, q, k] each query may see; None for all."""
    lengths = group.key_lengths
    if min(lengths) == max(lengths) and (not causal or max(group.query_lengths) == 1) and window is None:
        return None
    keys = torch.arange(max(lengths), device=device)
    visible = (keys < torch.tensor(lengths, device=device)[:, None])[:, None, None]
    if not causal:
        return visible
    past = torch.tensor(group.past, device=device)[:, None]
    queries = (past + torch.arange(max(group.query_lengths), device=device))[:, None, :, None]
    visible = visible & (keys <= queries)
    return visible if window is None else visible & (keys > queries - window)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    repeats = queries.shape[1] // keys.shape[1]
    if repeats == 1:
        return functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling)
    if queries.shape[2] == 1:
        # One token: the query heads that share a key head become its queries, so no key is copied.
        folded = queries.reshape(len(queries), keys.shape[1], repeats, -1)
        attended = functional.scaled_dot_product_attention(folded, keys, values, mask, scale=scaling)
        return attended.flatten(1, 2)[:, :, None]
    keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    return functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
