"""Which sequences run in the next step. Plain Python: no tensors, no HTTP, no locks."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from server.errors import ErrorKind, ServiceError
from server.fair_queue import FairQueue


class Schedulable(Protocol):
    """What the scheduler needs to know of a sequence."""

    @property
    def base(self) -> str: ...
    @property
    def tenant(self) -> str | None: ...
    @property
    def priority(self) -> int:
        """Lower is earlier, among the sequences of one tenant."""

    @property
    def num_new_tokens(self) -> int:
        """Tokens that its next step feeds to the model: the whole prompt first, then one at a time.

        Of a prompt that has run in part, what is left of its work.
        """

    @property
    def is_paused(self) -> bool:
        """Whether its prompt has run in part."""

    @property
    def in_parts(self) -> bool:
        """Whether its prompt is to run in parts, short as it is: others should not wait for all of it."""

    @property
    def num_pages(self) -> int:
        """Pages of the key-value cache that it holds while it runs; 0 for what ends after its prompt."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more, which may become so at any time, on another thread."""

    @property
    def finished(self) -> bool: ...


S = TypeVar("S", bound=Schedulable)

PART_TOKENS = 1
"""Of the work of a prompt that is to run in parts, for one step. It is half of a warm-up, in depths."""


@dataclass
class Room:
    """What a step may still take: tokens to run, generations and pages of the key-value cache."""

    tokens: int
    generations: int
    pages: int
    held: Counter[str | None] = field(default_factory=Counter)
    """Generations of each tenant that hold a place."""
    held_pages: Counter[str | None] = field(default_factory=Counter)

    def fits(self, sequence: Schedulable) -> bool:
        """Whether there is a place in the cache for it."""
        return not sequence.num_pages or (self.generations > 0 and sequence.num_pages <= self.pages)

    def hold(self, sequence: Schedulable) -> None:
        """Give it its place in the cache."""
        if sequence.num_pages:
            self.generations -= 1
            self.pages -= sequence.num_pages
            self.held[sequence.tenant] += 1
            self.held_pages[sequence.tenant] += sequence.num_pages


@dataclass(frozen=True)
class Batch(Generic[S]):
    """Sequences of one base that run together in one step.

    With `part_tokens` the last of them runs in parts, and this much of its work is for this step.
    """

    base: str
    sequences: tuple[S, ...]
    part_tokens: int = 0


class BaseQueue(Generic[S]):
    """The waiting sequences of one base, in turns of their tenants, and the running ones, oldest first.

    `num_pages` of cache are for them all; `partial` is the one whose prompt runs in parts.
    """

    def __init__(
        self, num_pages: int, max_sequences: int, tenant_share: int, clock: Callable[[], float]
    ) -> None:
        self.num_pages = num_pages
        self.max_sequences = max_sequences
        self.waiting: FairQueue[S] = FairQueue(tenant_share, max_sequences, clock)
        self.running: list[S] = []
        self.partial: S | None = None
        self._gave_way = False

    @property
    def in_background(self) -> bool:
        """Whether a prompt runs in parts because others should not wait for it."""
        return self.partial is not None and self.partial.in_parts

    @property
    def started(self) -> list[S]:
        return self.running if self.partial is None else [*self.running, self.partial]

    @property
    def awake(self) -> list[S]:
        """The running ones that take part in this step."""
        return [sequence for sequence in self.running if not self.waiting.rests(sequence.tenant)]

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.started)

    def begin_step(self, max_tokens: int) -> Room:
        """What this step may take beside all that goes on."""
        room = Room(max_tokens, self.max_sequences, self.num_pages)
        for sequence in self.started:
            room.hold(sequence)
        self.waiting.begin_step(self.started, self.partial)
        room.tokens -= sum(sequence.num_new_tokens for sequence in self.awake)
        return room

    def take_prompts(self, room: Room) -> None:
        """Start the waiting prompts that fit, in their order.

        One that is too long becomes the one that runs in parts: the first, where it is longer than the room,
        or any that is longer than its tenant may run whole, or that is to run so. Generations that wait for
        a place in the cache wait in their order, so that a large one has its turn, and do not hold up what
        needs none.
        """
        blocked, taken = False, False
        while self.waiting.has_next:
            sequence = self.waiting.peek()
            if sequence.num_pages and (blocked or self._holds_enough(sequence, room)):
                self.waiting.set_aside()
            elif not room.fits(sequence):
                self.waiting.set_aside()
                blocked = True
            elif self._runs_in_parts(sequence):
                self._start_partial(room)
            elif sequence.num_new_tokens <= room.tokens:
                self.running.append(self.waiting.pop())
                room.tokens -= sequence.num_new_tokens
                room.hold(sequence)
                taken = True
            else:
                if not taken:
                    self._start_partial(room)
                break
        self.waiting.put_back()

    def _holds_enough(self, sequence: S, room: Room) -> bool:
        """Whether its tenant has half of the cache, and others who ask for little are to find a place."""
        tenant = sequence.tenant
        if not (room.held[tenant] and self.waiting.yields(tenant)):
            return False
        pages = room.held_pages[tenant] + sequence.num_pages
        return room.held[tenant] >= self.max_sequences // 2 or pages > self.num_pages // 2

    def _runs_in_parts(self, sequence: S) -> bool:
        """Whether it is too long for its tenant, or is to run so, which does not wait for a long prompt."""
        if sequence.in_parts:
            return self.partial is None or self.partial.in_parts
        return sequence.num_new_tokens > self.waiting.longest(sequence.tenant)

    def _start_partial(self, room: Room) -> None:
        """Let the next prompt run in parts, unless another does."""
        if self.partial is None:
            self.partial = self.waiting.pop()
            room.hold(self.partial)
        else:
            self.waiting.set_aside()

    def take_part(self, room: Room) -> int:
        """How much of the prompt that runs in parts is for this step; 0 where there is none."""
        if self.partial is None or (self.in_background and self._gives_way()):
            return 0
        share = PART_TOKENS if self.in_background else room.tokens
        if self.waiting.yields(self.partial.tenant):
            share = min(share, self.waiting.share(self.partial.tenant))
        tokens = min(self.partial.num_new_tokens, max(1, share))
        room.tokens -= tokens
        return tokens

    def _gives_way(self) -> bool:
        """Whether this step is left to those who are not to wait: every other one, as long as some run."""
        self._gave_way = bool(self.awake) and not self._gave_way
        return self._gave_way


class Scheduler(Generic[S]):
    """Continuous batching under a token budget, round robin over the bases that have work.

    Every step of a base takes all its decoding sequences, one token each, and fills the rest of
    the budget with prompts: decoding never stalls, and a prompt waits only for older prompts of its tenant
    and for the turns of other tenants. One that is longer than the rest runs in parts, over several steps.
    Only a flood rests in some steps, see `FairQueue`.

    A generation starts once the cache has pages for its prompt and all that it asks for. It keeps them to its
    end, so none is ever stopped to make room, or runs twice.
    """

    def __init__(
        self,
        num_pages: Mapping[str, int],
        *,
        max_batch_tokens: int,
        max_tenant_tokens: int,
        max_sequences: int,
        max_queue: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_pages`: the pages of the key-value cache of each base."""
        self._queues: dict[str, BaseQueue[S]] = {
            base: BaseQueue(count, max_sequences, max_tenant_tokens, clock)
            for base, count in num_pages.items()
        }
        self._turns = deque(self._queues)
        self._max_batch_tokens = max_batch_tokens
        self._max_queue = max_queue

    def num_waiting(self, base: str) -> int:
        return len(self._queues[base].waiting)

    def num_running(self, base: str) -> int:
        return len(self._queues[base].started)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return any(queue.has_work for queue in self._queues.values())

    def sequences(self, base: str) -> list[S]:
        """All that wait or run on a base."""
        queue = self._queues[base]
        return [*queue.waiting, *queue.started]

    def waiting(self) -> list[S]:
        return [sequence for queue in self._queues.values() for sequence in queue.waiting]

    def running(self) -> list[S]:
        return [sequence for queue in self._queues.values() for sequence in queue.started]

    def add(self, sequences: Sequence[S], *, beyond_limit: bool = False) -> None:
        """Queue the sequences of one request, all of them or, where the queue is full, none.

        A tenant fills a queue of its own, so that its flood refuses nobody else. Raises ServiceError: 429, to
        be retried, unless they may go `beyond_limit`; 400 where one needs more cache than there is.
        """
        queue = self._queues[sequences[0].base]
        if (most := max(sequence.num_pages for sequence in sequences)) > queue.num_pages:
            message = (
                f"prompt and max_tokens need {most} pages of the key-value cache; it has {queue.num_pages}"
            )
            raise ServiceError(ErrorKind.CONTEXT_LENGTH, message, param="max_tokens")
        length = queue.waiting.count(sequences[0].tenant) + len(sequences)
        if length > self._max_queue and not beyond_limit:
            message = f"the queue of {sequences[0].base} is full ({self._max_queue} sequences)"
            raise ServiceError(ErrorKind.OVERLOADED, message, retry_after=1)
        queue.waiting.extend(sequences)

    def drop_cancelled(self) -> list[S]:
        """Forget cancelled sequences; returns those that were running, whose slots are to be freed."""
        dropped: list[S] = []
        for queue in self._queues.values():
            if any(sequence.cancelled for sequence in queue.waiting):
                queue.waiting.keep(lambda sequence: not sequence.cancelled)
            left: list[S] = []
            for sequence in queue.running:
                (dropped if sequence.cancelled else left).append(sequence)
            queue.running = left
            if queue.partial is not None and queue.partial.cancelled:
                dropped.append(queue.partial)
                queue.partial = None
        return dropped

    def drop_all(self) -> list[S]:
        """Forget everything; returns it."""
        dropped: list[S] = []
        for queue in self._queues.values():
            dropped += [*queue.started, *queue.waiting]
            queue.running, queue.partial = [], None
            queue.waiting.clear()
        return dropped

    def schedule(self) -> Batch[S] | None:
        """The next batch, or None where no base has work."""
        for _ in range(len(self._turns)):
            base = self._turns[0]
            self._turns.rotate(-1)
            queue = self._queues[base]
            if queue.has_work:
                return self._batch(base, queue)
        return None

    def _batch(self, base: str, queue: BaseQueue[S]) -> Batch[S]:
        room = queue.begin_step(self._max_batch_tokens)
        part_tokens = 0 if queue.in_background else queue.take_part(room)
        queue.take_prompts(room)
        part_tokens = part_tokens or queue.take_part(room)
        partial = (queue.partial,) if queue.partial is not None and part_tokens else ()
        return Batch(base, (*queue.awake, *partial), part_tokens)

    def postprocess(self, batch: Batch[S]) -> None:
        """Retire the sequences that ended in this step."""
        queue = self._queues[batch.base]
        if batch.part_tokens and queue.partial is not None and not queue.partial.is_paused:
            queue.running.append(queue.partial)
            queue.partial = None
        queue.running = [sequence for sequence in queue.running if not sequence.finished]
