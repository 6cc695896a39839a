"""The order in which sequences that wait are served: tenants take turns, measured in tokens."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Queueable(Protocol):
    """What the queue needs to know of a sequence."""

    @property
    def tenant(self) -> str | None: ...
    @property
    def num_new_tokens(self) -> int: ...


Q = TypeVar("Q", bound=Queueable)


class FairQueue(Generic[Q]):
    """Next is the oldest sequence of the tenant that was given the fewest tokens.

    This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI
    2024), for prompts: a tenant that comes back starts level with those that wait, so that nobody saves
    up, and each that waits gets the same share however much the others ask for. Within a tenant the oldest
    is first.

    Of one step a tenant gets at most `share` tokens, or one prompt that is longer, so that a step which
    others wait for is short. Sequences of no tenant know no such bound.
    """

    def __init__(self, share: int) -> None:
        self._share = share
        self._taken: Counter[str | None] = Counter()
        """Tokens that were taken for this step."""
        self._waiting: dict[str | None, deque[Q]] = {}
        self._given: dict[str | None, int] = {}
        """Tokens, on a scale on which only differences between tenants matter."""
        self._last = 0
        """What the tenant had that left nobody waiting."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Q]:
        for sequences in self._waiting.values():
            yield from sequences

    def count(self, tenant: str | None) -> int:
        """How many of a tenant's wait."""
        return len(self._waiting.get(tenant, ()))

    def extend(self, sequences: Iterable[Q]) -> None:
        for sequence in sequences:
            self._line(sequence.tenant).append(sequence)

    def begin_step(self, partial: Q | None = None) -> None:
        """Give every tenant its share anew, less what the prompt takes that goes on in parts."""
        self._taken.clear()
        if partial is not None:
            self._taken[partial.tenant] = partial.num_new_tokens

    @property
    def has_next(self) -> bool:
        """Whether somebody waits whose share of this step is not used up."""
        return any(map(self._may_take, self._waiting))

    def peek(self) -> Q:
        """The next one; there has to be one."""
        return self._waiting[self._turn()][0]

    def pop(self) -> Q:
        """Remove and return the next one; its prompt is held against its tenant."""
        tenant = self._turn()
        sequence = self._waiting[tenant].popleft()
        self._given[tenant] += sequence.num_new_tokens
        self._taken[tenant] += sequence.num_new_tokens
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._last = self._given[tenant]
        return sequence

    def set_aside(self) -> Q:
        """Remove and return the next one, which cannot run in this step; nothing is held against its tenant.

        Before anybody else comes it has to be put back.
        """
        tenant = self._turn()
        sequence = self._waiting[tenant].popleft()
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        return sequence

    def put_back(self, aside: Iterable[Q]) -> None:
        """Undo `set_aside`; the sequences are given in its order."""
        sequences = [*aside]
        lines: dict[str | None, deque[Q]] = {}
        for tenant in dict.fromkeys(sequence.tenant for sequence in sequences):
            lines[tenant] = self._waiting.pop(tenant, deque())
        for sequence in reversed(sequences):
            lines[sequence.tenant].appendleft(sequence)
        # Of tenants that are level in every respect, the first in the table has its turn.
        self._waiting = lines | self._waiting

    def keep(self, wanted: Callable[[Q], bool]) -> None:
        """Forget the others."""
        kept = {tenant: deque(filter(wanted, line)) for tenant, line in self._waiting.items()}
        self._waiting = {tenant: line for tenant, line in kept.items() if line}

    def clear(self) -> None:
        self._waiting.clear()

    def _turn(self) -> str | None:
        """Of tenants that are level, the one with the shorter line: that delays the other by least."""
        ready = filter(self._may_take, self._waiting)
        return min(ready, key=lambda tenant: (self._given[tenant], len(self._waiting[tenant])))

    def _may_take(self, tenant: str | None) -> bool:
        taken = self._taken[tenant]
        return tenant is None or not taken or taken + self._waiting[tenant][0].num_new_tokens <= self._share

    def _line(self, tenant: str | None) -> deque[Q]:
        """The tenant's sequences that wait. One that had none starts level with the others."""
        if tenant not in self._waiting:
            level = min((self._given[other] for other in self._waiting), default=self._last)
            self._given[tenant] = max(self._given.get(tenant, 0), level)
            self._waiting[tenant] = deque()
        return self._waiting[tenant]
