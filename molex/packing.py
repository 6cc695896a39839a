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
    """Requests whose attention runs in one call: one request, or several that run a single token each.

    All of them run `queries` tokens; `keys[i]` counts those and the cached ones before them.
    """

    requests: tuple[int, ...]
    queries: int
    keys: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.requests) * self.queries

    @property
    def has_past(self) -> bool:
        return max(self.keys) > self.queries


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

        A request of several tokens runs alone: on a CPU, padding and gathering cost more than the calls that
        they save. Single tokens, as in decoding, run together with those of similar history.
        """
        calls = [[i] for i in range(len(self)) if self.lengths[i] > 1]
        single = [i for i in range(len(self)) if self.lengths[i] == 1]
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
        keys = tuple(self.lengths[i] + self.past[i] for i in requests)
        return AttentionGroup(tuple(requests), self.lengths[requests[0]], keys)

    @cached_property
    def grouped(self) -> Tensor | None:
        """The packed tokens in the order of the groups; None where they already are."""
        order = [i for group in self.groups for i in group.requests]
        return None if order == list(range(len(self))) else self.tokens(order)

    @cached_property
    def restored(self) -> Tensor | None:
        """The inverse of `grouped`."""
        return None if self.grouped is None else self.grouped.argsort()
