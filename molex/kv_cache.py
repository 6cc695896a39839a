"""Keys and values of running generations, in pages.

At a mixed depth a request has a stream of keys and values for the depth's own layer and one for each routed
layer, because the layers disagree about what a token's key is. A page keeps `PAGE_TOKENS` tokens of one
stream, at every depth. A request takes pages for all the tokens that it may come to when it starts, so
nothing that runs ever waits for memory.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molex.errors import MolexError
from molex.packing import Indices

PAGE_TOKENS = 16


class CacheFullError(MolexError):
    """There are not enough free pages."""


def pages_for(num_tokens: int, num_streams: int = 1) -> int:
    """The pages that so many tokens take in so many streams."""
    return num_streams * -(-num_tokens // PAGE_TOKENS)


@dataclass
class KeptPage:
    """A full page in each of a request's streams, the request's route, and how many slots hold the page."""

    pages: tuple[int, ...]
    route: tuple[Any, ...]
    holders: int = 1


@dataclass(frozen=True, eq=False)
class Slot:
    """The pages [streams, n] of one request: those of its own layers, then those of its routed ones.

    The first `num_reused` tokens are there already, and with them the `route` that they were run with.
    `keys[i]` is what its page i is kept under; None for one of its own beside a kept one.
    """

    pages: Indices
    num_reused: int = 0
    route: tuple[Any, ...] | None = None
    keys: list[bytes | None] = field(default_factory=list)

    @property
    def num_streams(self) -> int:
        return len(self.pages)

    @property
    def max_length(self) -> int:
        """Tokens that there is room for."""
        return int(self.pages.shape[1]) * PAGE_TOKENS


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where something is written, on a CPU.

    PyTorch writes its zeros; NumPy asks the operating system for zeroed memory, which comes into being at the
    first write. Pages that were never used cost nothing.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class DepthCache:
    """Keys and values of one depth: `pages` [pages, 2 · heads, tokens, head_dim], keys before values."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.pages = _zeros(shape, dtype, device)
        self._heads = self.pages.view(-1, PAGE_TOKENS * shape[-1])

    def write(self, places: Tensor, kv: Tensor) -> None:
        """Store keys and values [n, 2 · heads, head_dim] at places [2, n]: pages, and tokens in them."""
        self.pages[places[0], :, places[1]] = kv.to(self.pages.dtype)

    def read(self, heads: Tensor) -> Tensor:
        """The tokens of pages side by side, [b, 2 · heads, pages · tokens, head_dim].

        `heads` [b, 2 · heads, pages] counts the heads of all pages: 2 · heads · page + head.
        """
        tokens = self._heads.index_select(0, heads.view(-1))
        return tokens.view(*heads.shape[:2], -1, self.pages.shape[-1])


class KVCache:
    """`num_pages` pages, from which running requests take their slots."""

    def __init__(
        self,
        num_pages: int,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        shape = (num_pages, 2 * num_heads, PAGE_TOKENS, head_dim)
        self.depths = [DepthCache(shape, dtype, device) for _ in range(num_layers)]
        self._free = list(range(num_pages))
        self._taken: set[Slot] = set()
        self._kept: dict[bytes, KeptPage] = {}
        self._unused: OrderedDict[bytes, KeptPage] = OrderedDict()
        self.num_unused = 0
        """Pages that are kept, and held by no slot."""
        self._num_touched = 0

    @property
    def nbytes(self) -> int:
        """Of the pages that were ever used: a page stays in memory once it is written."""
        return self._num_touched * sum(depth.pages[0].nbytes for depth in self.depths)

    @property
    def num_free(self) -> int:
        """Pages that a slot can get, kept ones included."""
        return len(self._free) + self.num_unused

    def allocate(self, num_tokens: int, num_streams: int = 1, keys: Sequence[bytes] = ()) -> Slot:
        """Take pages for so many tokens in each of a request's streams. Raises CacheFullError.

        As many of its first pages as are kept under `keys` are shared. Of the free ones the lowest are taken,
        so that fewer are ever touched.
        """
        found = list(takewhile(self._kept.__contains__, keys))
        kept = [self._kept[key] for key in found]
        reused = len(found) * PAGE_TOKENS
        count = pages_for(num_tokens - reused, num_streams)
        free = self.num_free - sum(len(page.pages) for page in kept if not page.holders)
        if count > free:
            raise CacheFullError(f"{num_tokens} tokens need {count} more pages; {free} are free")
        for key, page in zip(found, kept, strict=True):
            page.holders += 1
            if self._unused.pop(key, None):
                self.num_unused -= num_streams
        shared = np.array([page.pages for page in kept], dtype=np.int64).reshape(-1, num_streams).T
        own = self._take(count).reshape(num_streams, -1)
        route = kept[0].route if kept else None
        slot = Slot(np.concatenate([shared, own], axis=1), reused, route, [*found])
        self._taken.add(slot)
        return slot

    def _take(self, count: int) -> Indices:
        while count > len(self._free):
            key, kept = self._unused.popitem(last=False)
            del self._kept[key]
            self.num_unused -= len(kept.pages)
            self._give(kept.pages)
        pages = np.array([heapq.heappop(self._free) for _ in range(count)], dtype=np.int64)
        self._wipe(pages[pages < self._num_touched])
        self._num_touched = max(self._num_touched, int(pages.max(initial=-1)) + 1)
        return pages

    def _give(self, pages: Sequence[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    def _wipe(self, pages: Indices) -> None:
        """Masked keys and values are multiplied by 0, and a former request may have left NaN behind."""
        if len(pages):
            index = torch.from_numpy(pages).to(self.depths[0].pages.device)
            for depth in self.depths:
                depth.pages.index_fill_(0, index, 0)

    def keep(self, slot: Slot, keys: Sequence[bytes], route: tuple[Any, ...]) -> None:
        """Keep the first pages of a slot, which are full, under `keys` for requests to come."""
        for number in range(len(slot.keys), len(keys)):
            key = keys[number]
            if key in self._kept:
                slot.keys.append(None)
                continue
            self._kept[key] = KeptPage(tuple(slot.pages[:, number].tolist()), route)
            slot.keys.append(key)

    def free(self, slot: Slot) -> None:
        """Give the pages of a slot back. Raises MolexError where they were given back before."""
        if slot not in self._taken:
            raise MolexError("this slot is not allocated")
        self._taken.remove(slot)
        # From the end: a page is of use only after all those before it, so it should go before them.
        for number in reversed(range(slot.pages.shape[1])):
            key = slot.keys[number] if number < len(slot.keys) else None
            if key is None:
                self._give(slot.pages[:, number].tolist())
            else:
                self._release(key)

    def _release(self, key: bytes) -> None:
        kept = self._kept[key]
        kept.holders -= 1
        if not kept.holders:
            self._unused[key] = kept
            self.num_unused += len(kept.pages)
