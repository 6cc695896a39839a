"""Attention over packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from molex.kv_cache import DepthCache
from molex.packing import AttentionGroup, Indices, Packed

HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))


@dataclass(frozen=True)
class KVStreams:
    """Where the requests of a `Packed` keep keys and values: a stream of `cache` each, or None."""

    cache: DepthCache
    streams: Sequence[int | None]

    def write(self, packed: Packed, keys: Tensor, values: Tensor) -> None:
        """Append keys and values [n, heads, head_dim] of the packed tokens to their requests' streams."""
        kept = np.array([i for i, stream in enumerate(self.streams) if stream is not None], dtype=np.int64)
        if not len(kept):
            return
        positions = packed.positions
        if len(kept) < len(packed):
            tokens = packed.tokens(kept)
            keys, values, positions = keys[tokens], values[tokens], positions[tokens]
        streams = np.repeat([self.streams[i] for i in kept], packed.lengths[kept])
        where = torch.from_numpy(np.stack([streams, positions])).to(keys.device)
        self.cache.write(where[0], where[1], keys, values)

    def read(self, group: AttentionGroup) -> tuple[Tensor, Tensor]:
        """Keys and values [b, heads, k, head_dim] of a group whose requests all have a stream."""
        streams = [self.streams[i] for i in group.requests]
        return self.cache.read([s for s in streams if s is not None], int(group.keys.max()))


def packed_attention(
    heads: Tensor,
    num_kv_heads: int,
    packed: Packed,
    kv: KVStreams | None,
    scaling: float,
    window: int | None = None,
    rows: Indices | None = None,
) -> Tensor:
    """Each request attends to its own tokens and to nothing else.

    `heads` [n, num_heads + 2 · num_kv_heads, head_dim] are the queries, keys and values of the packed tokens.
    Returns [m, num_heads, head_dim] for the tokens `rows` [m], by default all. With a `window` a token sees
    that many tokens back, itself included.
    """
    sizes = [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads]
    if kv is not None:
        kv.write(packed, *heads.split(sizes, dim=1)[1:])
    outputs = []
    for group, piece in zip(packed.groups, _split(heads, packed), strict=True):
        # Widened here, not all at once: the caches of a CPU hold one group.
        queries, keys, values = _widened(piece).split(sizes, dim=1)
        if group.has_past:
            assert kv is not None, "earlier tokens are in a cache"
            keys, values = (x.to(queries.dtype) for x in kv.read(group))
        mask = _mask(group, packed.causal, window, heads.device)
        causal = packed.causal and mask is None and group.queries > 1
        attended = _attend(queries, keys, values, mask, causal, scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1).to(heads.dtype))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if packed.grouped is None and rows is None:
        return output
    wanted = packed.restored if rows is None else packed.restored[rows]
    return output.index_select(0, torch.from_numpy(wanted).to(output.device))


def _widened(x: Tensor) -> Tensor:
    """On a CPU without AMX, PyTorch's float32 kernel is twice as fast as its bfloat16 one for tens of tokens.

    With AMX it takes up to three times as long.
    """
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not HAS_AMX else x


def _split(heads: Tensor, packed: Packed) -> list[Tensor]:
    """[n, heads, head_dim] → [b, heads, q, head_dim] of each group."""
    rows = heads if packed.grouped is None else heads.index_select(0, packed.grouped)
    # One split, not a slice a group: the gradient of a slice is as large as all rows.
    pieces = torch.split(rows, [group.num_rows for group in packed.groups])
    return [
        piece.view(-1, group.queries, *rows.shape[1:]).transpose(1, 2)
        for piece, group in zip(pieces, packed.groups, strict=True)
    ]


def _mask(group: AttentionGroup, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys [b, 1, q or 1, k] each query may see; None where it sees all, or all up to itself.

    Padding behind a request is a key for no token. What padding itself attends to is not used.
    """
    if not causal and not group.is_padded:
        return None
    longest = int(group.keys.max()) if group.has_past else group.queries
    keys = torch.arange(longest, device=device)
    totals = torch.from_numpy(group.keys).to(device)[:, None]
    if not causal:
        return keys < totals[:, :, None, None]
    if (window is None or longest <= window) and (
        not group.has_past or (group.queries == 1 and group.keys.min() == longest)
    ):
        return None
    starts = totals - torch.from_numpy(group.lengths).to(device)[:, None]
    queries = (starts + torch.arange(group.queries, device=device))[:, None, :, None]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> Tensor:
    """Attention [b, heads, q, head_dim] with as many or fewer key heads."""
    repeats = queries.shape[1] // keys.shape[1]
    if repeats > 1 and queries.shape[2] == 1:
        # One token: the query heads that share a key head become its queries, so no key is copied.
        folded = queries.reshape(len(queries), keys.shape[1], repeats, -1)
        attended = functional.scaled_dot_product_attention(folded, keys, values, mask, scale=scaling)
        return attended.flatten(1, 2)[:, :, None]
    if repeats > 1:
        keys, values = (heads.repeat_interleave(repeats, dim=1) for heads in (keys, values))
    return functional.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=causal, scale=scaling
    )
