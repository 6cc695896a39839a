"""Which adapters' weights are in memory. Plain bookkeeping: no files, no locks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from math import inf, log2
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from molex.adapter import Adapter


class Evictable(Protocol):
    """What an adapter is known by while its weights may be elsewhere."""

    @property
    def nbytes(self) -> int:
        """What its weights take in memory."""

    @property
    def pinned(self) -> bool:
        """Whether it stays once it is there."""


K = TypeVar("K", bound=Evictable)


HALF_LIFE = 8
"""Requests, for each adapter in memory, after which an earlier one counts half as much."""


class Popularity(Generic[K]):
    """How often and how recently keys were asked for.

    The sum of 2^(t - now) over the requests at times t, in half-lives of a request: the "combined recency and
    frequency" of Lee et al., "LRFU: A Spectrum of Policies that Subsumes the Least Recently Used and Least
    Frequently Used Policies" (2001). As now is the same for all, the logarithms of the sums are kept for
    now = 0: they change with requests, and not with time.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._logarithms: WeakKeyDictionary[K, float] = WeakKeyDictionary()

    def __getitem__(self, key: K) -> float:
        """The higher, the more popular; of what was never asked for, minus infinity."""
        return self._logarithms.get(key, -inf)

    def hand_over(self, key: K, successor: K) -> None:
        """Let a key be known by another."""
        if key in self._logarithms:
            self._logarithms[successor] = self._logarithms.pop(key)

    def asked(self, key: K, half_life: float) -> None:
        """Count a request, of which `half_life` make one half-life."""
        self._now += 1 / half_life
        self._logarithms[key] = self._now + log2(1 + 2 ** (self[key] - self._now))


class Residents(Generic[K]):
    """Weights by key within a number and a budget of bytes; the least popular are evicted first.

    `in_use` tells the adapters of admitted requests. Those are not evicted: that would free nothing. Where
    they were replaced or deleted, they take their room until their last request has ended.
    """

    def __init__(
        self, max_count: int, max_bytes: int, in_use: Callable[[], Set[Adapter]] = frozenset
    ) -> None:
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.in_use = in_use
        self._weights: dict[K, Adapter] = {}
        self._popularity: Popularity[K] = Popularity()
        self._reserved: set[K] = set()

    def __contains__(self, key: K) -> bool:
        return key in self._weights

    def __iter__(self) -> Iterator[K]:
        return iter(self._weights)

    def pinned(self) -> set[Adapter]:
        """The weights that stay."""
        return {adapter for key, adapter in self._weights.items() if key.pinned}

    def leaving(self) -> set[Adapter]:
        """Adapters that requests use and that are no longer resident."""
        return set(self.in_use()).difference(self._weights.values())

    def get(self, key: K) -> Adapter | None:
        """The weights for a request, which counts, if they are in memory."""
        self._popularity.asked(key, HALF_LIFE * max(1, len(self._weights)))
        return self._weights.get(key)

    def reserve(self, key: K, *, evict: bool = True) -> list[K] | None:
        """Keep room for weights that `add` will bring; returns what was evicted for it.

        None, and nothing is evicted, where pinned adapters and those in use leave no room, or where room is
        left only by evicting and `evict` forbids it.
        """
        in_use = set(self.in_use())
        leaving = in_use.difference(self._weights.values())
        sizes = [item.nbytes for item in {*self._weights, *self._reserved, key}]
        sizes += [adapter.nbytes for adapter in leaving]
        excess, excess_bytes = len(sizes) - self.max_count, sum(sizes) - self.max_bytes
        evicted: list[K] = []
        if evict and (excess > 0 or excess_bytes > 0):
            for candidate in self._evictable(in_use):
                evicted.append(candidate)
                excess -= 1
                excess_bytes -= candidate.nbytes
                if excess <= 0 and excess_bytes <= 0:
                    break
        if excess > 0 or excess_bytes > 0:
            return None
        for candidate in evicted:
            del self._weights[candidate]
        self._reserved.add(key)
        return evicted

    def _evictable(self, in_use: Set[Adapter]) -> list[K]:
        """The least popular first, and of those that nobody has asked for the one that is there longest."""
        keys = [key for key, adapter in self._weights.items() if not key.pinned and adapter not in in_use]
        return sorted(keys, key=self._popularity.__getitem__)

    def add(self, key: K, adapter: Adapter) -> Adapter:
        """Put weights into the room that was reserved for them; returns those that are there.

        They may have come by another way meanwhile, and requests use them already.
        """
        self._reserved.discard(key)
        return self._weights.setdefault(key, adapter)

    def hand_over(self, key: K, successor: K) -> None:
        """Let weights and their popularity go on under another key."""
        self._popularity.hand_over(key, successor)
        if key in self._weights:
            self._weights[successor] = self._weights[key]
        self.discard(key)

    def discard(self, key: K) -> None:
        """Forget the weights of a key, and any room that is reserved for them."""
        self._weights.pop(key, None)
        self._reserved.discard(key)
