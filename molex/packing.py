"""Packed rows: the tokens of many requests side by side, without padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

# PyTorch's float32 attention on a CPU is fastest at these lengths: 32 queries take less time than 22.
LENGTH_STEP = 16
# What a call reads and writes should fit the cache of a core or two.
ROWS_PER_CALL = 512


@dataclass(frozen=True)
class AttentionGroup:
    """Requests whose attention runs in one call.

    Each takes `queries` rows: the first `lengths[i]` are its tokens, the others padding. `keys[i]`
    counts those tokens and the cached ones before them.
    """

    requests: tuple[int, ...]
    queries: int
    lengths: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.requests) * self.queries

    @property
    def is_padded(self) -> bool:
        return min(self.lengths) < self.queries

    @property
    def has_past(self) -> bool:
        return self.keys != self.lengths


class Packed:
    """Where each of r requests lies among n packed tokens.

    `lengths[i]` tokens of request i run now, after `past[i]` tokens that a cache holds; `members[i]` says
    which of the batch's adapters it belongs to. Requests of one adapter lie next to each other.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        past: Sequence[int],
        members: Sequence[int],
        *,
        causal: bool,
        device: torch.device,
    ) -> None:
        self.lengths = list(lengths)
        self.past = list(past)
        self.members = list(members)
        self.causal = causal
        self.device = device
        self.offsets = [0, *accumulate(self.lengths)]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @cached_property
    def positions(self) -> Tensor:
        """The position [n] of each token in its own request, counted from 0."""
        shift = [past - offset for past, offset in zip(self.past, self.offsets, strict=False)]
        return torch.arange(self.num_tokens, device=self.device) + self.spread(
            torch.tensor(shift, device=self.device)
        )

    def segments(self, requests: Sequence[int]) -> list[tuple[int, int, int]]:
        """Runs of tokens of one adapter where some requests lie side by side: (member, first token, end)."""
        runs: list[tuple[int, int, int]] = []
        end = 0
        for i in requests:
            start, end = end, end + self.lengths[i]
            if runs and runs[-1][0] == self.members[i]:
                runs[-1] = (self.members[i], runs[-1][1], end)
            else:
                runs.append((self.members[i], start, end))
        return runs

    @cached_property
    def _lengths_tensor(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device)

    def spread(self, per_request: Tensor) -> Tensor:
        """Repeat a value [r, …] of each request for each of its tokens: [n, …]."""
        return per_request.repeat_interleave(self._lengths_tensor, dim=0, output_size=self.num_tokens)

    def tokens(self, requests: Sequence[int]) -> Tensor:
        """The packed indices of the tokens of some requests, in order."""
        return torch.cat([self._everything[self.offsets[i] : self.offsets[i + 1]] for i in requests])

    @cached_property
    def _everything(self) -> Tensor:
        return torch.arange(self.num_tokens, device=self.device)

    def subset(self, requests: Sequence[int]) -> Packed:
        """The same for some of the requests, packed on their own."""
        return Packed(
            [self.lengths[i] for i in requests],
            [self.past[i] for i in requests],
            [self.members[i] for i in requests],
            causal=self.causal,
            device=self.device,
        )

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """The requests in calls to attention.

        Requests without cached tokens run together with those of similar length, padded; single tokens, as in
        decoding, with those of similar history. Several tokens after cached ones run alone.
        """
        calls: list[list[int]] = []
        by_length: dict[int, list[int]] = defaultdict(list)
        single: list[int] = []
        for i, (length, past) in enumerate(zip(self.lengths, self.past, strict=True)):
            if length == 1:
                single.append(i)
            elif past:
                calls.append([i])
            else:
                by_length[-(-length // LENGTH_STEP) * LENGTH_STEP].append(i)
        for length, alike in by_length.items():
            most = max(1, ROWS_PER_CALL // length)
            calls += [alike[first : first + most] for first in range(0, len(alike), most)]
        for i in sorted(single, key=self.past.__getitem__, reverse=True):
            if calls and self._share_a_call(calls[-1][0], i):
                calls[-1].append(i)
            else:
                calls.append([i])
        return [self._group(sorted(requests)) for requests in calls]

    def _share_a_call(self, longest: int, request: int) -> bool:
        """Whether both run one token, little is padded, and either both have cached keys or none has."""
        if self.lengths[longest] > 1 or bool(self.past[longest]) != bool(self.past[request]):
            return False
        return 2 * (self.past[longest] - self.past[request]) <= self.past[longest] + 64

    def _group(self, requests: list[int]) -> AttentionGroup:
        lengths = tuple(self.lengths[i] for i in requests)
        queries = max(lengths)
        if min(lengths) < queries:
            queries = -(-queries // LENGTH_STEP) * LENGTH_STEP
        keys = tuple(self.lengths[i] + self.past[i] for i in requests)
        return AttentionGroup(tuple(requests), queries, lengths, keys)

    @cached_property
    def grouped(self) -> Tensor | None:
        """The packed token in each row of the groups, side by side; None where those are the packed tokens.

        A padding row repeats the last token of its request.
        """
        order = [i for group in self.groups for i in group.requests]
        if order == list(range(len(self))) and not any(group.is_padded for group in self.groups):
            return None
        rows = [group.queries for group in self.groups for _ in group.requests]
        ends = [self.offsets[i + 1] - 1 for i in order]
        shifts = [
            self.offsets[i] - first for i, first in zip(order, accumulate(rows, initial=0), strict=False)
        ]
        repeats, last, shift = torch.tensor([rows, ends, shifts], device=self.device)
        numbers = torch.arange(sum(rows), device=self.device)
        spread = torch.repeat_interleave(torch.stack([last, shift]), repeats, dim=1, output_size=len(numbers))
        return torch.minimum(numbers + spread[1], spread[0])

    @cached_property
    def restored(self) -> Tensor | None:
        """The row of the groups that holds each packed token [n]; the inverse of `grouped`."""
        if self.grouped is None:
            return None
        shifts, first = [0] * len(self), 0
        for group in self.groups:
            for i in group.requests:
                shifts[i] = first - self.offsets[i]
                first += group.queries
        return self._everything + self.spread(torch.tensor(shifts, device=self.device))
