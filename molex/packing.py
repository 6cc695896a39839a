"""Packed rows: the tokens of many requests side by side, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionGroup:
    """Requests of similar length whose attention runs in one padded call.

    `index` [b, q] holds the packed index of each query (padding repeats a request's last token), `flat` the
    entries of `index` that are real tokens (None: all of them). `bounds` is set where the group is one
    unpadded block of neighbours, which needs no gathering at all.
    """

    requests: tuple[int, ...]
    query_lengths: tuple[int, ...]
    past: tuple[int, ...]
    index: Tensor
    flat: Tensor | None
    bounds: tuple[int, int] | None

    @property
    def key_lengths(self) -> tuple[int, ...]:
        return tuple(q + p for q, p in zip(self.query_lengths, self.past, strict=True))


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
    def owners(self) -> Tensor:
        """The request [n] that each token belongs to."""
        return self.spread(torch.arange(len(self), device=self.device))

    @cached_property
    def positions(self) -> Tensor:
        """The position [n] of each token in its own request, counted from 0."""
        shift = [past - offset for past, offset in zip(self.past, self.offsets, strict=False)]
        return torch.arange(self.num_tokens, device=self.device) + self.spread(
            torch.tensor(shift, device=self.device)
        )

    @cached_property
    def segments(self) -> list[tuple[int, int, int]]:
        """Runs of tokens of one adapter: (member, first token, end)."""
        runs: list[tuple[int, int, int]] = []
        for member, start, stop in zip(self.members, self.offsets, self.offsets[1:], strict=False):
            if runs and runs[-1][0] == member:
                runs[-1] = (member, runs[-1][1], stop)
            else:
                runs.append((member, start, stop))
        return runs

    @cached_property
    def _lengths_tensor(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device)

    def spread(self, per_request: Tensor) -> Tensor:
        """Repeat a value [r, …] of each request for each of its tokens: [n, …]."""
        return per_request.repeat_interleave(self._lengths_tensor, dim=0, output_size=self.num_tokens)

    def tokens(self, requests: Sequence[int]) -> Tensor:
        """The packed indices of the tokens of some requests, in order."""
        everything = torch.arange(self.num_tokens, device=self.device)
        return torch.cat([everything[self.offsets[i] : self.offsets[i + 1]] for i in requests])

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
        """The requests in groups of similar length, longest first."""
        order = sorted(range(len(self)), key=lambda i: (self.lengths[i], self.past[i]), reverse=True)
        groups: list[list[int]] = []
        for i in order:
            if groups and self._fits(groups[-1][0], i):
                groups[-1].append(i)
            else:
                groups.append([i])
        return [self._group(sorted(group)) for group in groups]

    def _fits(self, longest: int, request: int) -> bool:
        """Whether padding `request` to the size of `longest` wastes little. Each group costs a few calls."""
        if not self.past[longest] and self.past[request]:
            return False
        queries, keys = self.lengths[longest], self.lengths[longest] + self.past[longest]
        return (
            4 * (queries - self.lengths[request]) <= queries + 16
            and 2 * (keys - self.lengths[request] - self.past[request]) <= keys + 64
        )

    def _group(self, requests: list[int]) -> AttentionGroup:
        lengths = tuple(self.lengths[i] for i in requests)
        starts = torch.tensor([self.offsets[i] for i in requests], device=self.device)
        steps = torch.arange(max(lengths), device=self.device)
        past = tuple(self.past[i] for i in requests)
        if min(lengths) == max(lengths):
            neighbours = requests == list(range(requests[0], requests[0] + len(requests)))
            bounds = (self.offsets[requests[0]], self.offsets[requests[-1] + 1]) if neighbours else None
            index = starts[:, None] + steps
            return AttentionGroup(tuple(requests), lengths, past, index, None, bounds)
        limits = torch.tensor(lengths, device=self.device)[:, None]
        index = starts[:, None] + torch.minimum(steps, limits - 1)
        flat = (steps < limits).flatten().nonzero()[:, 0]
        return AttentionGroup(tuple(requests), lengths, past, index, flat, None)

    @cached_property
    def restore(self) -> Tensor | None:
        """Puts tokens that lie group after group back in packed order; None where they already are."""
        if len(self.groups) == 1 and list(self.groups[0].requests) == list(range(len(self))):
            return None
        order = self.tokens([i for group in self.groups for i in group.requests])
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=self.device))
