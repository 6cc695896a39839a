"""The order in which sequences that wait are served: tenants take turns, measured in tokens."""

from __future__ import annotations

import sys
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Generic, Protocol, TypeVar

RECENT_SECONDS = 60
"""For so long a tenant is active after it asked for something or something of it ran."""
SMALL = 4
"""Beside a tenant that asks for little, others get this part of their share of a step."""
OLDEST_EVERY = 8
"""So often the oldest of a tenant's sequences is next, whatever its priority."""


class Queueable(Protocol):
    """What the queue needs to know of a sequence."""

    @property
    def tenant(self) -> str | None: ...
    @property
    def num_new_tokens(self) -> int: ...
    @property
    def num_pages(self) -> int:
        """Pages of the key-value cache that it is to hold; 0 for what is no generation."""

    @property
    def priority(self) -> int:
        """Lower is earlier, among the sequences of one tenant."""


Q = TypeVar("Q", bound=Queueable)


class Line(Generic[Q]):
    """What waits of one tenant. Next is the most urgent, of equals the oldest; every so often the oldest.

    So what is urgent does not wait for what is not, and nothing waits for ever.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, Q]] = []
        """Priority, number in order of arrival, sequence; sorted."""
        self._served = 0
        self.tokens = 0
        self.generations = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Q]:
        return (sequence for _, _, sequence in self._entries)

    def add(self, number: int, sequence: Q) -> None:
        insort(self._entries, (sequence.priority, number, sequence))
        self.tokens += sequence.num_new_tokens
        self.generations += sequence.num_pages > 0

    def peek(self) -> Q:
        return self._entries[self._next()][2]

    def pop(self) -> tuple[int, Q]:
        """Remove the next one; returns its number too."""
        _, number, sequence = self._entries.pop(self._next())
        self.tokens -= sequence.num_new_tokens
        self.generations -= sequence.num_pages > 0
        return number, sequence

    def keep(self, wanted: Callable[[Q], bool]) -> None:
        """Forget the others."""
        self._entries = [entry for entry in self._entries if wanted(entry[2])]
        self.tokens = sum(sequence.num_new_tokens for sequence in self)
        self.generations = sum(sequence.num_pages > 0 for sequence in self)

    def served(self) -> None:
        """What was removed last has had its turn."""
        self._served += 1

    def _next(self) -> int:
        entries = self._entries
        if (self._served + 1) % OLDEST_EVERY or entries[0][0] == entries[-1][0]:
            return 0
        return min(range(len(entries)), key=lambda place: entries[place][1])


class FairQueue(Generic[Q]):
    """Next is a sequence of the tenant that was given the fewest tokens.

    This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI
    2024), for prompts: a tenant that comes back starts level with those that wait, so that nobody saves
    up, and each that waits gets the same share however much the others ask for.

    Of one step a tenant gets at most `share` tokens, or one prompt that is longer, so that a step which
    others wait for is short. Beside a tenant that asks for little it gets a quarter of that, and nothing in
    a step that takes the other's, unless it had nothing in the one before: the other's next request finds
    a short step under way, and no neighbours in its own. A tenant asks for little that was active lately,
    has no more waiting than its share, and has as many generations, waiting or running, as a third of the
    `places` at most. Sequences of no tenant know no such bounds.

    Beside generations of those who ask for little, floods take as many tokens as these do, some at a time:
    then they rest, which makes steps short, until the others have generated as many.
    """

    def __init__(self, share: int, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._few = max(1, places // 3)
        """The most generations of a tenant that asks for little."""
        self._clock = clock
        self._taken: Counter[str | None] = Counter()
        """Tokens that were taken for this step."""
        self._waiting: dict[str | None, Line[Q]] = {}
        self._aside: list[tuple[Line[Q], int, Q]] = []
        self._numbers = count()
        self._given: dict[str | None, int] = {}
        """Tokens, on a scale on which only differences between tenants matter."""
        self._last = 0
        """The level when nobody waited any more."""
        self._seen: dict[str | None, float] = {}
        """When a tenant was last active."""
        self._modest: set[str | None] = set()
        """Who asks for little in this step."""
        self._reserved = False
        """Whether the prompts of this step are theirs alone."""
        self._beside = False
        """Whether others than floods generate in this step."""
        self._debt = 0
        """Tokens that floods took beside them, and that they have not generated since."""
        self._resting = False
        """Whether floods take nothing of this step."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Q]:
        for line in self._waiting.values():
            yield from line

    def count(self, tenant: str | None) -> int:
        """How many of a tenant's wait."""
        return len(self._waiting.get(tenant, ()))

    def extend(self, sequences: Iterable[Q]) -> None:
        for sequence in sequences:
            self._line(sequence.tenant).add(next(self._numbers), sequence)
            self._seen[sequence.tenant] = self._clock()

    def begin_step(self, started: Sequence[Q], partial: Q | None) -> None:
        """Give every tenant its share anew, less what the prompt takes that goes on in parts.

        The tenants of `started` are active.
        """
        now = self._clock()
        generations = Counter(sequence.tenant for sequence in started if sequence.num_pages)
        self._seen |= dict.fromkeys((sequence.tenant for sequence in started), now)
        self._seen = {tenant: seen for tenant, seen in self._seen.items() if now - seen <= RECENT_SECONDS}
        for tenant, line in self._waiting.items():
            generations[tenant] += line.generations
        self._modest = {
            tenant
            for tenant in self._seen
            if self._tokens(tenant) <= self._share and generations[tenant] <= self._few
        }
        self._reserved = not self._reserved and any(tenant in self._waiting for tenant in self._modest)
        self._let_rest([sequence for sequence in started if sequence is not partial])
        self._taken.clear()
        if partial is not None:
            self._taken[partial.tenant] = partial.num_new_tokens

    def yields(self, tenant: str | None) -> bool:
        """Whether it takes less in this step, because another asks for little."""
        return tenant is not None and len(self._modest) > (tenant in self._modest)

    def floods(self, tenant: str | None) -> bool:
        """Whether it asks for much, and another for little."""
        return tenant not in self._modest and self.yields(tenant)

    def rests(self, tenant: str | None) -> bool:
        """Whether it takes nothing of this step, but for a prompt that runs in parts."""
        return self._resting and self.floods(tenant)

    def longest(self, tenant: str | None) -> int:
        """The longest prompt of a tenant that may run whole in this step."""
        return self._share if self.yields(tenant) else sys.maxsize

    def share(self, tenant: str | None) -> int:
        """The tokens that a tenant may take of this step."""
        if tenant is None:
            return sys.maxsize
        return max(1, self._share // SMALL) if self.yields(tenant) else self._share

    @property
    def has_next(self) -> bool:
        """Whether somebody waits whose share of this step is not used up."""
        return any(map(self._may_take, self._waiting))

    def peek(self) -> Q:
        """The next one; there has to be one."""
        return self._waiting[self._turn()].peek()

    def pop(self) -> Q:
        """Remove and return the next one; its prompt is held against its tenant."""
        tenant = self._turn()
        line = self._waiting[tenant]
        _, sequence = line.pop()
        line.served()
        self._given[tenant] += sequence.num_new_tokens
        self._taken[tenant] += sequence.num_new_tokens
        if self.floods(tenant):
            self._owe(sequence.num_new_tokens)
        if not line:
            del self._waiting[tenant]
            self._last = self._given[tenant]
        return sequence

    def set_aside(self) -> None:
        """Pass the next one over, which cannot run in this step; nothing is held against its tenant.

        Before anybody else comes `put_back` has to be called.
        """
        tenant = self._turn()
        line = self._waiting[tenant]
        self._aside.append((line, *line.pop()))
        if not line:
            del self._waiting[tenant]

    def put_back(self) -> None:
        """Undo `set_aside`."""
        lines: dict[str | None, Line[Q]] = {}
        for line, number, sequence in self._aside:
            line.add(number, sequence)
            lines[sequence.tenant] = line
        self._aside.clear()
        # Of tenants that are level in every respect, the first in the table has its turn.
        self._waiting = lines | self._waiting

    def keep(self, wanted: Callable[[Q], bool]) -> None:
        """Forget the others."""
        for line in self._waiting.values():
            line.keep(wanted)
        left = {tenant: line for tenant, line in self._waiting.items() if line}
        if self._waiting and not left:
            self._last = self._level()
        self._waiting = left

    def clear(self) -> None:
        self._waiting.clear()

    def _let_rest(self, running: Sequence[Q]) -> None:
        """Decide whether floods rest in this step, of which each of `running` takes a token."""
        floods = sum(self.floods(sequence.tenant) for sequence in running)
        others = len(running) - floods
        self._beside = others > 0
        self._debt = max(0, self._debt - others)
        self._resting = self._beside and self._debt > 0
        if not self._resting:
            self._owe(floods)

    def _owe(self, tokens: int) -> None:
        if self._beside:
            self._debt = min(self._debt + tokens, self._share)

    def _tokens(self, tenant: str | None) -> int:
        line = self._waiting.get(tenant)
        return 0 if line is None else line.tokens

    def _turn(self) -> str | None:
        """Of tenants that are level, the one with the shorter line: that delays the other by least."""
        ready = filter(self._may_take, self._waiting)
        return min(ready, key=lambda tenant: (self._given[tenant], len(self._waiting[tenant])))

    def _may_take(self, tenant: str | None) -> bool:
        if self.rests(tenant) or (self._reserved and self.floods(tenant)):
            return False
        taken = self._taken[tenant]
        return not taken or taken + self._waiting[tenant].peek().num_new_tokens <= self.share(tenant)

    def _line(self, tenant: str | None) -> Line[Q]:
        """The tenant's sequences that wait. One that had none starts level with the others."""
        if tenant not in self._waiting:
            self._given[tenant] = max(self._given.get(tenant, 0), self._level())
            self._waiting[tenant] = Line()
        return self._waiting[tenant]

    def _level(self) -> int:
        """The least that a tenant had of those that wait."""
        return min((self._given[tenant] for tenant in self._waiting), default=self._last)
