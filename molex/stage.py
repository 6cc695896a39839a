"""Which rows several layer calls read, side by side, and which low-rank updates act on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from molex.lora import ActiveLora, BatchLora, Run
from molex.packing import Indices


@dataclass(frozen=True, eq=False)
class Stage:
    """What several layers read in one half of theirs, call by call.

    `rows` lists the places to read among the tokens side by side, padded behind each call to `sizes` in all;
    `tokens` are the rows of the batch's hidden states there, `counts` the numbers without padding, `runs` the
    rows of each adapter in each call, and `lora` the updates of the batch's adapters.
    """

    rows: Indices
    tokens: Tensor
    counts: Sequence[int]
    sizes: Sequence[int]
    runs: Sequence[Sequence[Run]]
    lora: BatchLora

    @classmethod
    def of_the_base(cls, count: int, device: torch.device) -> Stage:
        """The first `count` rows for one call, without updates."""
        rows = np.arange(count)
        return cls(rows, torch.from_numpy(rows).to(device), [count], [count], [[]], BatchLora([]))

    @cached_property
    def active(self) -> list[ActiveLora | None]:
        """The updates of each call; None where the batch has none."""
        if not self.lora.updates:
            return [None] * len(self.counts)
        return [ActiveLora(self.lora, runs) for runs in self.runs]

    @cached_property
    def runs_side_by_side(self) -> Tensor:
        """All runs [n, 3] by their places among the rows of all calls, which must have no padding."""
        offsets = np.cumsum([0, *self.sizes[:-1]])
        runs = [
            (member, start + offset, stop + offset)
            for offset, runs in zip(offsets.tolist(), self.runs, strict=True)
            for member, start, stop in runs
        ]
        return torch.tensor(runs, dtype=torch.int64).view(-1, 3)

    def read(self, hidden: Tensor) -> Sequence[Tensor]:
        """The rows of each call."""
        rows: Sequence[Tensor] = hidden.index_select(0, self.tokens).split(list(self.sizes))
        return rows
