"""The factors of the adapters in use, side by side in the memory of a base's device.

A bank has arrays A [ranks, in] and B [ranks, out] for each site that adapters update. An adapter takes a slot
in them: neighbouring ranks, the same ones at all sites. The width of a slot is its class, the least power of
two that the adapter's largest rank fits into, and a slot begins at a multiple of its width. So slots of one
class take each other's places, two leave one of twice the width behind, and nothing is moved to make room.

`low_rank_blocks` reads the arrays where they are, and of a slot the ranks that its adapter has.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor

from molex.lora import BatchLora, LoraWeights, Site, Stack


@dataclass(frozen=True)
class Slot:
    """The ranks start..stop of all arrays, and the batches that read them."""

    start: int
    stop: int
    readers: WeakSet[BatchLora] = field(default_factory=WeakSet)


class AdapterBank:
    """Slots within a budget of bytes; the least recently used are given away first. For one thread at a time.

    A slot stays its adapter's while a batch that reads it exists, and while `pinned` names the adapter. It is
    free once the adapter has died.
    """

    def __init__(
        self,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        pinned: Callable[[], Set[LoraWeights]] = frozenset,
    ) -> None:
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.device = device
        self.pinned = pinned
        self._arrays: dict[Site, tuple[Tensor, Tensor]] = {}
        self._num_ranks = 0
        self._slots: WeakKeyDictionary[LoraWeights, Slot] = WeakKeyDictionary()
        """The most recently used comes last."""

    def __contains__(self, weights: LoraWeights) -> bool:
        return weights in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """What the arrays take, whether their slots are in use or not."""
        return sum(a.nbytes + b.nbytes for a, b in self._arrays.values())

    def serve(self, batch: BatchLora) -> bool:
        """Have a batch read its factors here, copied in where they are not yet; whether it does.

        It does not where they are being trained or have another precision, or where there is no room for all
        of them beside slots that are read or pinned: then the batch has to stack them for itself.
        """
        if not self._can_keep(batch) or not self._cover(batch):
            return False
        missing = [weights for weights in batch.adapters if weights.updates and not self._use(weights, batch)]
        if not all(self._bring(weights) and self._use(weights, batch) for weights in missing):
            for slot in self._slots.values():
                slot.readers.discard(batch)
            return False
        batch.read({site: self._stack(site, batch) for site in batch.updates})
        return True

    def _use(self, weights: LoraWeights, batch: BatchLora) -> bool:
        """Have a batch read the slot of an adapter, if it has one, as of now the most recently used."""
        slot = self._slots.pop(weights, None)
        if slot is None:
            return False
        slot.readers.add(batch)
        self._slots[weights] = slot
        return True

    def _can_keep(self, batch: BatchLora) -> bool:
        return all(
            update.a.dtype == self.dtype and not update.takes_gradients
            for updates in batch.updates.values()
            for update in updates.values()
        )

    def _cover(self, batch: BatchLora) -> bool:
        """Have arrays for all sites of a batch; whether there are.

        Sites that no adapter before had share the budget with the others, so that there are fewer ranks: the
        bank starts anew, empty, for which no batch may be reading it.
        """
        if batch.updates.keys() <= self._arrays.keys():
            return True
        if any(slot.readers for slot in self._slots.values()):
            return False
        shapes = {site: (a.shape[1], b.shape[1]) for site, (a, b) in self._arrays.items()}
        for site, updates in batch.updates.items():
            update = next(iter(updates.values()))
            shapes[site] = update.a.shape[1], len(update.b)
        self._slots.clear()
        self._num_ranks = self.max_bytes // (self.dtype.itemsize * sum(map(sum, shapes.values())))
        # The old arrays go first, so that both never exist at a time.
        self._arrays = {}
        self._arrays = {site: (self._new_array(n), self._new_array(m)) for site, (n, m) in shapes.items()}
        return True

    def _new_array(self, width: int) -> Tensor:
        # Written to at once, so that the bank takes its memory now and no more of it later.
        return torch.empty(self._num_ranks, width, dtype=self.dtype, device=self.device).zero_()

    def _bring(self, weights: LoraWeights) -> bool:
        """Copy the factors of an adapter into a slot, if one can be had; whether it could."""
        largest = max(len(update.a) for update in weights.updates.values())
        width = 1 << (largest - 1).bit_length()
        start = self._best_place(width)
        if start is None:
            return False
        slot = Slot(start, start + width)
        for other, taken in list(self._slots.items()):
            if taken.start < slot.stop and slot.start < taken.stop:
                del self._slots[other]
        for site, update in weights.updates.items():
            a, b = self._arrays[site]
            end = start + len(update.a)
            a[start:end].copy_(update.a)
            b[start:end].copy_(update.b.T)
        self._slots[weights] = slot
        return True

    def _best_place(self, width: int) -> int | None:
        """Where a slot of a width is free, or else was used least recently; None where no slot may go."""
        pinned = self.pinned()
        last_use = np.zeros(self._num_ranks // width * width)
        for turn, (weights, slot) in enumerate(self._slots.items(), start=1):
            last_use[slot.start : slot.stop] = np.inf if slot.readers or weights in pinned else turn
        if not len(last_use):
            return None
        places = last_use.reshape(-1, width).max(axis=1)
        best = int(places.argmin())
        return None if np.isinf(places[best]) else best * width

    def _stack(self, site: Site, batch: BatchLora) -> Stack:
        layout = []
        for member, update in batch.updates[site].items():
            start = self._slots[batch.adapters[member]].start
            layout.append((member, start, start + len(update.a), update.scaling))
        return Stack(*self._arrays[site], tuple(layout))
