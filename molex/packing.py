"""Packed rows: the tokens of many requests side by side, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# PyTorch's float32 attention on a CPU is fastest at these lengths: 32 queries take less time than 22.
LENGTH_STEP = 16
# What a call reads and writes should fit the cache of a core or two.
ROWS_PER_CALL = 512

Indices = npt.NDArray[np.int64]
"""Small index arithmetic is NumPy's: PyTorch takes several times as long for each operation."""


def ranges(starts: Indices, lengths: Indices, rows: Indices | None = None) -> Indices:
    """start, start + 1, … of several ranges side by side: `lengths[i]` numbers of range i.

    With `rows` each is padded to `rows[i]` numbers with its last one.
    """
    rows = lengths if rows is None else rows
    within = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
    if rows is not lengths:
        within = np.minimum(within, np.repeat(lengths - 1, rows))
    numbers: Indices = np.repeat(starts, rows) + within
    return numbers


def starts_of_runs(values: Indices) -> Indices:
    """The places of the first of equal neighbours."""
    differs = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs.nonzero()[0]


@dataclass(frozen=True)
class AttentionGroup:
    """Requests whose attention runs in one call.

    Each takes `queries` rows: the first `lengths[i]` are its tokens, the others padding. `keys[i]`
    counts those tokens and the cached ones before them.
    """

    requests: Indices
    queries: int
    lengths: Indices
    keys: Indices

    @property
    def num_rows(self) -> int:
        return len(self.requests) * self.queries

    @property
    def is_padded(self) -> bool:
        return bool(self.lengths.min() < self.queries)

    @property
    def has_past(self) -> bool:
        return bool((self.keys > self.lengths).any())


class Packed:
    """Where each of r requests lies among n packed tokens.

    `lengths[i]` tokens of request i run now, after `past[i]` tokens that a cache holds; `members[i]` says
    which of the batch's adapters it belongs to. Requests of one adapter lie next to each other. The tokens of
    request i start at `offsets[i]`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Indices,
        past: Sequence[int] | Indices,
        members: Sequence[int] | Indices,
        *,
        causal: bool,
        device: torch.device,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.past = np.asarray(past, dtype=np.int64)
        self.members = np.asarray(members, dtype=np.int64)
        self.offsets = self.lengths.cumsum() - self.lengths
        self.num_tokens = int(self.lengths.sum())
        self.causal = causal
        self.device = device
        self.masks: dict[tuple[int, int | None], Tensor | None] = {}
        """What attention has made of a group, by its number and a window: the same at all depths."""
        self._rows_of: dict[bytes | None, Tensor | None] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def bounds(self) -> Tensor:
        """Where requests begin and the last one ends [r + 1]."""
        return torch.from_numpy(np.append(self.offsets, self.num_tokens)).to(self.device)

    @cached_property
    def positions(self) -> Indices:
        """The position [n] of each token in its own request, counted from 0."""
        return ranges(self.past, self.lengths)

    @cached_property
    def owners(self) -> Indices:
        """The request [n] of each token."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def tokens(self, requests: Indices) -> Indices:
        """The packed indices of the tokens of some requests, in order."""
        return ranges(self.offsets[requests], self.lengths[requests])

    def segments(self, requests: Indices) -> list[tuple[int, int, int]]:
        """Runs of tokens of one adapter where some requests lie side by side: (member, first token, end)."""
        members, ends = self.members[requests], self.lengths[requests].cumsum()
        first = starts_of_runs(members)
        stops = ends[np.append(first[1:], len(members)) - 1].tolist()
        return list(zip(members[first].tolist(), [0, *stops], stops, strict=False))

    def subset(self, requests: Indices) -> Packed:
        """The same for some of the requests, packed on their own."""
        return Packed(
            self.lengths[requests],
            self.past[requests],
            self.members[requests],
            causal=self.causal,
            device=self.device,
        )

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """The requests in calls to attention.

        Requests without cached tokens run together with those of similar length, padded; single tokens, as in
        decoding, with those of similar history. Several tokens after cached ones run alone.
        """
        single = self.lengths == 1
        calls = [np.array([i]) for i in np.flatnonzero(~single & (self.past > 0))]
        rounded = np.where(single | (self.past > 0), 0, -(-self.lengths // LENGTH_STEP) * LENGTH_STEP)
        for length in np.unique(rounded[rounded > 0]).tolist():
            alike = np.flatnonzero(rounded == length)
            most = max(1, ROWS_PER_CALL // length)
            calls += [alike[first : first + most] for first in range(0, len(alike), most)]
        calls += self._single_token_calls(np.flatnonzero(single))
        return [self._group(requests) for requests in calls]

    def _single_token_calls(self, requests: Indices) -> list[Indices]:
        calls: list[list[int]] = []
        for i in sorted(requests.tolist(), key=self.past.__getitem__, reverse=True):
            if calls and self._share_a_call(calls[-1][0], i):
                calls[-1].append(i)
            else:
                calls.append([i])
        return [np.array(sorted(call)) for call in calls]

    def _share_a_call(self, longest: int, request: int) -> bool:
        """Whether little is padded, and either both have cached keys or none has."""
        most, past = int(self.past[longest]), int(self.past[request])
        return bool(most) == bool(past) and 2 * (most - past) <= most + 64

    def _group(self, requests: Indices) -> AttentionGroup:
        lengths = self.lengths[requests]
        queries = int(lengths.max())
        if lengths.min() < queries:
            queries = -(-queries // LENGTH_STEP) * LENGTH_STEP
        return AttentionGroup(requests, queries, lengths, lengths + self.past[requests])

    @cached_property
    def _group_rows(self) -> tuple[Indices, Indices]:
        """The requests in the order of the groups, and how many rows each takes there."""
        return (
            np.concatenate([group.requests for group in self.groups]),
            np.concatenate([np.full(len(group.requests), group.queries) for group in self.groups]),
        )

    @cached_property
    def grouped(self) -> Tensor | None:
        """The packed token in each row of the groups, side by side; None where those are the packed tokens.

        A padding row repeats the last token of its request.
        """
        requests, rows = self._group_rows
        lengths = self.lengths[requests]
        if (rows == lengths).all() and (requests == np.arange(len(self))).all():
            return None
        return torch.from_numpy(ranges(self.offsets[requests], lengths, rows)).to(self.device)

    @cached_property
    def restored(self) -> Indices:
        """The row of the groups that holds each packed token [n]; the inverse of `grouped`."""
        requests, rows = self._group_rows
        first = np.empty(len(self), dtype=np.int64)
        first[requests] = rows.cumsum() - rows
        return ranges(first, self.lengths)

    def grouped_rows_of(self, tokens: Indices | None) -> Tensor | None:
        """The rows of the groups that hold some packed tokens, by default all; None where they are all rows.

        Kept, as it is the same at all depths.
        """
        key = None if tokens is None else tokens.tobytes()
        if key not in self._rows_of:
            rows = self.restored if tokens is None else self.restored[tokens]
            is_all = self.grouped is None and np.array_equal(rows, np.arange(self.num_tokens))
            self._rows_of[key] = None if is_all else torch.from_numpy(rows).to(self.device)
        return self._rows_of[key]
