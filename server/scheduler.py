"""Which sequences run in the next step. Plain Python: no tensors, no HTTP, no locks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    def num_new_tokens(self) -> int:
        """Tokens that its next step feeds to the model: the whole prompt first, then one at a time."""

    @property
    def needs_slot(self) -> bool:
        """Whether it keeps a generation slot between steps."""

    @property
    def cancelled(self) -> bool: ...
    @property
    def finished(self) -> bool: ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True)
class Batch(Generic[S]):
    """Sequences of one base that run together in one step."""

    base: str
    sequences: tuple[S, ...]

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_new_tokens for sequence in self.sequences)


class BaseQueue(Generic[S]):
    """The waiting sequences of one base, in turns of their tenants, and the running ones, oldest first."""

    def __init__(self, tenant_share: int) -> None:
        self.waiting: FairQueue[S] = FairQueue(tenant_share)
        self.running: list[S] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def take_prompts(self, budget: int, free_slots: int) -> list[S]:
        """Remove and return the waiting prompts that fit, in their order.

        The first is always taken, so that a prompt longer than the budget runs too, as the only prompt
        of its step. Prompts that wait for a generation slot do not hold up those that need none.
        """
        taken: list[S] = []
        passed: list[S] = []
        self.waiting.begin_step()
        while self.waiting.has_next:
            sequence = self.waiting.peek()
            if sequence.needs_slot and free_slots == 0:
                passed.append(self.waiting.pop())
                continue
            if taken and sequence.num_new_tokens > budget:
                break
            taken.append(self.waiting.pop())
            budget -= sequence.num_new_tokens
            free_slots -= sequence.needs_slot
        self.waiting.put_back(passed)
        return taken


class Scheduler(Generic[S]):
    """Continuous batching under a token budget, round robin over the bases that have work.

    Every step of a base takes all its decoding sequences, one token each, and fills the rest of
    the budget with prompts: decoding never stalls, and a prompt waits only for older prompts of its tenant
    and for the turns of other tenants.
    """

    def __init__(
        self,
        bases: Iterable[str],
        *,
        max_batch_tokens: int,
        max_tenant_tokens: int,
        max_sequences: int,
        max_queue: int,
    ) -> None:
        self._queues: dict[str, BaseQueue[S]] = {base: BaseQueue(max_tenant_tokens) for base in bases}
        self._turns = deque(self._queues)
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_queue = max_queue

    def num_waiting(self, base: str) -> int:
        return len(self._queues[base].waiting)

    def num_running(self, base: str) -> int:
        return len(self._queues[base].running)

    def add(self, sequences: Sequence[S]) -> None:
        """Queue the sequences of one request, all of them or, where the queue is full, none.

        A tenant fills a queue of its own, so that its flood refuses nobody else. Raises ServiceError (429,
        to be retried).
        """
        queue = self._queues[sequences[0].base]
        if queue.waiting.count(sequences[0].tenant) + len(sequences) > self._max_queue:
            message = f"the queue of {sequences[0].base} is full ({self._max_queue} sequences)"
            raise ServiceError(ErrorKind.OVERLOADED, message, retry_after=1)
        queue.waiting.extend(sequences)

    def drop_cancelled(self) -> list[S]:
        """Forget cancelled sequences; returns those that were running, whose slots are to be freed."""
        dropped: list[S] = []
        for queue in self._queues.values():
            if any(sequence.cancelled for sequence in queue.waiting):
                queue.waiting.keep(lambda sequence: not sequence.cancelled)
            dropped += [sequence for sequence in queue.running if sequence.cancelled]
            queue.running = [sequence for sequence in queue.running if not sequence.cancelled]
        return dropped

    def drop_all(self) -> list[S]:
        """Forget everything; returns it."""
        dropped: list[S] = []
        for queue in self._queues.values():
            dropped += [*queue.running, *queue.waiting]
            queue.running = []
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
        decoding = list(queue.running)
        budget = self._max_batch_tokens - len(decoding)
        free_slots = self._max_sequences - len(decoding)
        queue.running += queue.take_prompts(budget, free_slots)
        return Batch(base, tuple(queue.running))

    def postprocess(self, batch: Batch[S]) -> None:
        """Retire the sequences that ended in this step."""
        queue = self._queues[batch.base]
        queue.running = [sequence for sequence in queue.running if not sequence.finished]
