"""Attention over packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import rotate_half

from molex.kv_cache import PAGE_TOKENS, DepthCache, pages_for
from molex.packing import AttentionGroup, Indices, Packed

HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))


class KVPlan:
    """Where the requests of a `Packed` keep keys and values: the same at all depths.

    `pages` [r, n] lists the pages of each request's stream, the last of them again where it has fewer, and -1
    for a request that keeps nothing. At least one does.
    """

    def __init__(self, packed: Packed, pages: Indices, num_heads: int) -> None:
        kept = np.flatnonzero(pages[:, 0] >= 0)
        self.tokens = None
        positions, owners = packed.positions, packed.owners
        if len(kept) < len(packed):
            tokens = packed.tokens(kept)
            self.tokens = torch.from_numpy(tokens).to(packed.device)
            positions, owners = positions[tokens], owners[tokens]
        page, token = np.divmod(positions, PAGE_TOKENS)
        self.places = torch.from_numpy(np.stack([pages[owners, page], token])).to(packed.device)
        self.heads = [
            _heads(pages[group.requests, : pages_for(int(group.keys.max()))], 2 * num_heads).to(packed.device)
            if group.has_past
            else None
            for group in packed.groups
        ]


def _heads(pages: Indices, count: int) -> Tensor:
    """Pages [b, n] → the heads [b, count, n] of theirs, counted over all pages."""
    return torch.from_numpy(pages[:, None] * count + np.arange(count)[:, None])


@dataclass(frozen=True)
class KVStreams:
    """Keys and values of one depth, where a `KVPlan` says."""

    cache: DepthCache
    plan: KVPlan

    def write(self, kv: Tensor) -> None:
        """Keep keys and values [n, 2 · heads, head_dim] of the packed tokens."""
        tokens = self.plan.tokens
        self.cache.write(self.plan.places, kv if tokens is None else kv.index_select(0, tokens))

    def read(self, group: int, length: int) -> Tensor:
        """The first keys and values [b, 2 · heads, length, head_dim] of a group's requests."""
        heads = self.plan.heads[group]
        assert heads is not None, "a group with earlier tokens"
        return self.cache.read(heads)[:, :, :length]


@dataclass(frozen=True)
class AttentionOptions:
    """Of a layer: its number of key heads, what scores are multiplied by, how many tokens a token sees."""

    num_kv_heads: int
    scaling: float
    window: int | None


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
        kv.write(heads[:, sizes[0] :])
    outputs = []
    for number, (group, piece) in enumerate(zip(packed.groups, _split(heads, packed), strict=True)):
        # Widened here, not all at once: the caches of a CPU hold one group.
        queries, keys, values = _widened(piece).split(sizes, dim=1)
        if group.has_past:
            assert kv is not None, "earlier tokens are in a cache"
            kept = kv.read(number, int(group.keys.max())).to(queries.dtype)
            keys, values = kept.split(num_kv_heads, dim=1)
        if (number, window) not in packed.masks:
            packed.masks[number, window] = _mask(group, packed.causal, window, heads.device)
        mask = packed.masks[number, window]
        causal = packed.causal and mask is None and group.queries > 1
        attended = scaled_attention(queries, keys, values, mask, causal, scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1).to(heads.dtype))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    wanted = packed.grouped_rows_of(rows)
    return output if wanted is None else output.index_select(0, wanted)


def attend(
    heads: Tensor, packed: Packed, kv: KVStreams | None, options: AttentionOptions, rows: Indices
) -> Tensor:
    """`packed_attention` of a layer with these options, for the tokens `rows`."""
    return packed_attention(heads, options.num_kv_heads, packed, kv, options.scaling, options.window, rows)


def rotated(heads: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the queries and keys among heads [n, heads, head_dim]."""
    turning, values = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    cos, sin = cos[:, None].to(heads.dtype), sin[:, None].to(heads.dtype)
    turned = turning * cos + rotate_half(turning) * sin
    return torch.cat([turned, values], dim=1)


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


def scaled_attention(
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
