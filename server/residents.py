"""Which adapters' weights are in memory. Plain bookkeeping: no files, no locks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import Generic, Protocol, TypeVar

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


class Residents(Generic[K]):
    """Weights by key within a number and a budget of bytes; the least recently used are evicted first.

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
        """The most recently used comes last."""
        self._reserved: set[K] = set()

    def __contains__(self, key: K) -> bool:
        return key in self._weights

    def __iter__(self) -> Iterator[K]:
        """The residents, least recently used first."""
        return iter(self._weights)

    def pinned(self) -> set[Adapter]:
        """The weights that stay."""
        return {adapter for key, adapter in self._weights.items() if key.pinned}

    def leaving(self) -> set[Adapter]:
        """Adapters that requests use and that are no longer resident."""
        return set(self.in_use()).difference(self._weights.values())

    def get(self, key: K) -> Adapter | None:
        """The weights, if they are in memory, as of now the most recently used."""
        adapter = self._weights.pop(key, None)
        if adapter is not None:
            self._weights[key] = adapter
        return adapter

    def reserve(self, key: K, *, evict: bool = True) -> list[K] | None:
        """Keep room for weights that `add` will bring; returns what was evicted for it.

        None, and nothing is evicted, where pinned adapters and those in use leave no room, or where room is
        left only by evicting and `evict` forbids it.
        """
        in_use = set(self.in_use())
        leaving = in_use.difference(self._weights.values())
        sizes = [item.nbytes for item in (*self._weights, *self._reserved, key)]
        sizes += [adapter.nbytes for adapter in leaving]
        excess, excess_bytes = len(sizes) - self.max_count, sum(sizes) - self.max_bytes
        evicted: list[K] = []
        for candidate, adapter in self._weights.items() if evict else ():
            if excess <= 0 and excess_bytes <= 0:
                break
            if not candidate.pinned and adapter not in in_use:
                evicted.append(candidate)
                excess -= 1
                excess_bytes -= candidate.nbytes
        if excess > 0 or excess_bytes > 0:
            return None
        for candidate in evicted:
            del self._weights[candidate]
        self._reserved.add(key)
        return evicted

    def add(self, key: K, adapter: Adapter) -> None:
        """Put weights into the room that was reserved for them."""
        self._reserved.remove(key)
        self._weights[key] = adapter

    def discard(self, key: K) -> None:
        """Forget the weights of a key, and any room that is reserved for them."""
        self._weights.pop(key, None)
        self._reserved.discard(key)
