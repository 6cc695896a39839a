"""Keys and values of running generations.

At a mixed depth a request has a stream of keys and values for the depth's own layer and one for each routed
layer, because the layers disagree about what a token's key is. A request owns one slot in every depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from molex.errors import MolexError

STREAMS = 3
"""The own layer and at most two routed ones."""


class CacheFullError(MolexError):
    """Every slot is taken."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where something is written, on a CPU.

    PyTorch writes its zeros; NumPy asks the operating system for zeroed pages, which come into being at the
    first write. Slots that are never used, and the ends of those that are, cost nothing.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class DepthCache:
    """Keys and values of one depth: `keys` and `values` [streams · slots, heads, max_length, head_dim]."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, not empty memory: masked positions are multiplied by 0, and 0 · NaN would be NaN.
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)

    def write(self, streams: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [n, heads, head_dim] of n tokens at their streams [n] and positions [n]."""
        self.keys[streams, :, positions] = keys.to(self.keys.dtype)
        self.values[streams, :, positions] = values.to(self.values.dtype)

    def read(self, streams: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of b streams, each [b, heads, length, head_dim]."""
        first, count = streams[0], len(streams)
        if list(streams) == list(range(first, first + count)):
            return (
                self.keys[first : first + count, :, :length],
                self.values[first : first + count, :, :length],
            )
        index = torch.tensor(streams, device=self.keys.device)
        return (
            self.keys[:, :, :length].index_select(0, index),
            self.values[:, :, :length].index_select(0, index),
        )


class KVCache:
    """Slots of `max_length` tokens for at most `num_slots` requests at a time."""

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.max_length = max_length
        shape = (STREAMS * num_slots, num_heads, max_length, head_dim)
        self.depths = [DepthCache(shape, dtype, device) for _ in range(num_layers)]
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def nbytes(self) -> int:
        """Room for all slots; memory is touched as it is written."""
        return sum(depth.keys.nbytes + depth.values.nbytes for depth in self.depths)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take a slot, the lowest free one: low slots side by side are read without copying."""
        if not self._free:
            raise CacheFullError(f"all {self.num_slots} generation slots are taken")
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def free(self, slot: int) -> None:
        if slot in self._free or not 0 <= slot < self.num_slots:
            raise MolexError(f"slot {slot} is not allocated")
        self._free.append(slot)

    def stream(self, slot: int, choice: int) -> int:
        """Where a slot keeps the stream of the own layer (choice 0) or of the n-th routed one."""
        return choice * self.num_slots + slot
