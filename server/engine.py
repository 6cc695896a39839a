"""The one thread boundary: requests come in on the event loop, steps run on the worker thread."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from threading import Condition, Thread
from time import perf_counter
from typing import ParamSpec, TypeVar

from molex.adapter import BARE, Adapter
from molex.routing import Route
from molex.threads import release_helpers
from server.adapters import AdapterStore
from server.base import Base, load_base
from server.errors import internal_error, stopping_error
from server.loader import Loader
from server.metrics import Metrics
from server.pool import Pool
from server.runner import StepOutput
from server.scheduler import Batch, Scheduler
from server.sequence import Sequence, Update
from server.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Submission:
    """The sequences of one request on their way, as its handler sees them."""

    def __init__(self, sequences: Seq[Sequence], cancel: Callable[[Seq[Sequence]], None]) -> None:
        self.sequences = sequences
        self._cancel = cancel
        self._queue: asyncio.Queue[Update] = asyncio.Queue()
        for sequence in sequences:
            sequence.sink = self._queue.put_nowait

    async def updates(self) -> AsyncIterator[Update]:
        """Updates of all the sequences as they come. Raises the first failure, a ServiceError."""
        remaining = len(self.sequences)
        while remaining:
            update = await self._queue.get()
            if update.error is not None:
                raise update.error
            remaining -= update.last
            yield update

    async def finished(self) -> list[Update]:
        """All updates, once every sequence has ended."""
        return [update async for update in self.updates()]

    def cancel(self) -> None:
        """Drop what has not ended: nobody waits for it any more."""
        self._cancel(self.sequences)


class Engine:
    """Owns the bases, the adapters, the scheduler and the worker thread."""

    def __init__(
        self, settings: Settings, bases: Mapping[str, Base], adapters: AdapterStore, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.bases = bases
        self.adapters = adapters
        self.metrics = metrics
        self.draining = False
        self._scheduler: Scheduler[Sequence] = Scheduler(
            {name: base.runner.num_pages for name, base in bases.items()},
            max_batch_tokens=settings.max_batch_tokens,
            max_tenant_tokens=settings.max_tenant_tokens,
            max_sequences=settings.max_sequences,
            max_queue=settings.max_queue,
        )
        self._alone: deque[Sequence] = deque()
        self._wake = Condition()
        self._stopping = False
        self._worker = Thread(target=self._work, name="worker", daemon=True)
        self._pool = Pool(settings.pool_threads, "pool")
        self.loader = Loader(adapters, metrics, threads=settings.pool_threads)
        adapters.watch_use(lambda: self._adapters_in_use(bases))
        self._loop: asyncio.AbstractEventLoop | None = None
        for name in bases:
            self._watch(name)
        metrics.watch_adapters(settings.max_resident_adapters, self._names_in_use)

    @classmethod
    def load(cls, settings: Settings) -> Engine:
        """Load the bases that the settings name. Raises BaseModelError."""
        bases = {name: load_base(name, source, settings) for name, source in settings.bases.items()}
        metrics = Metrics()
        adapters = AdapterStore({name: base.model for name, base in bases.items()}, settings, metrics)
        return cls(settings, bases, adapters, metrics)

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._worker.is_alive()

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self.alive and not self.draining

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        # This thread has loaded the bases. From now on only the worker should have helpers.
        release_helpers()
        self._worker.start()

    async def stop(self) -> None:
        """End the worker after its current step and answer what is left with 503."""
        self.draining = True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._worker.is_alive():
            await asyncio.to_thread(self._worker.join)
        self._pool.close()
        self.loader.close()

    async def in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks on a pool thread."""
        return await self._pool.run(function, *args, **kwargs)

    def submit(self, sequences: Seq[Sequence]) -> Submission:
        """Admit the sequences of one request, all of them on one base.

        Raises ServiceError: 429 where the queue is full, 503 where the engine has stopped.
        """
        submission = Submission(sequences, self._cancel)
        now = perf_counter()
        for sequence in sequences:
            sequence.timings.queued = now
        with self._wake:
            if self._stopping:
                raise stopping_error()
            self._scheduler.add(sequences)
            self._wake.notify()
        return submission

    def submit_alone(self, sequence: Sequence) -> Submission:
        """Admit a prompt ahead of the queue, to a step of its own. Raises ServiceError (503)."""
        submission = Submission([sequence], self._cancel)
        with self._wake:
            if self._stopping:
                raise stopping_error()
            self._alone.append(sequence)
            self._wake.notify()
        return submission

    def _cancel(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            sequence.cancelled = True
        with self._wake:
            self._wake.notify()

    def _work(self) -> None:
        try:
            while self._step():
                pass
        except Exception:
            log.critical("the worker thread died", exc_info=True)
        finally:
            self._abandon()

    def _step(self) -> bool:
        """Schedule, run, postprocess; False when the engine stops.

        In a frame of its own: while the worker waits, it holds no sequence, and so no adapter's weights.
        """
        batch = self._schedule()
        if batch is not None:
            self._postprocess(batch, self._run(batch))
        return batch is not None

    def _schedule(self) -> Batch[Sequence] | None:
        """Wait for work and choose the next batch; None when the engine stops."""
        with self._wake:
            while not self._stopping:
                self._drop_cancelled()
                if self._alone:
                    return Batch(self._alone[0].base, (self._alone[0],))
                if batch := self._scheduler.schedule():
                    self._mark_started(batch)
                    return batch
                self._wake.wait()
        return None

    def _drop_cancelled(self) -> None:
        for sequence in self._scheduler.drop_cancelled():
            self.bases[sequence.base].runner.release(sequence)

    def _mark_started(self, batch: Batch[Sequence]) -> None:
        now = perf_counter()
        for sequence in batch.sequences:
            sequence.timings.started = sequence.timings.started or now

    def _run(self, batch: Batch[Sequence]) -> StepOutput:
        """Run a batch. Where it fails, every member is answered and the worker goes on."""
        runner = self.bases[batch.base].runner
        try:
            return runner.run(batch.sequences, batch.part_tokens)
        except Exception:
            log.exception("a batch of %d sequences failed", len(batch.sequences))
            return runner.fail(batch.sequences)

    def _postprocess(self, batch: Batch[Sequence], output: StepOutput) -> None:
        # A sequence stays the scheduler's until its update is on the way: `_abandon` answers it otherwise.
        self._record(batch.base, output)
        with self._wake:
            self._scheduler.postprocess(batch)
            if self._alone and batch.sequences == (self._alone[0],):
                self._alone.popleft()
        self._deliver(output.updates)

    def _record(self, base: str, output: StepOutput) -> None:
        for stats in output.stats:
            self.metrics.batch(base, stats.tokens, stats.distinct_adapters, stats.distinct_layers)
        now = perf_counter()
        for update in output.updates:
            sequence = update.sequence
            if update.error is not None:
                continue
            if len(sequence.output_ids) <= 1:
                self._record_route(base, sequence)
            if sequence.output_ids:
                self._record_token(base, sequence, now)

    def _record_token(self, base: str, sequence: Sequence, now: float) -> None:
        timings = sequence.timings
        if len(sequence.output_ids) == 1:
            self.metrics.first_token(base, now - timings.created)
            self.metrics.reused(base, sequence.num_reused)
        else:
            self.metrics.next_token(base, now - timings.last_token)
        timings.last_token = now

    def _record_route(self, base: str, sequence: Sequence) -> None:
        molex = sequence.adapter.molex
        route: Route = sequence.route or ()
        for depth, choice in zip(molex.mixed_depths if molex else (), route, strict=True):
            for layer in choice.layers:
                self.metrics.routed(base, depth, layer)

    def _deliver(self, updates: Iterable[Update]) -> None:
        """Hand updates to the event loop, all of a step at once."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_dispatch, list(updates))
        except RuntimeError:
            log.warning("updates are lost: the event loop has closed")

    def _abandon(self) -> None:
        """Answer everything that is left, when the worker ends."""
        with self._wake:
            error = stopping_error() if self._stopping else internal_error()
            self._stopping = True
            left = [*self._scheduler.drop_all(), *self._alone]
        self._deliver(Update(sequence, error=error) for sequence in left)

    def _adapters_in_use(self, bases: Iterable[str]) -> set[Adapter]:
        """Those of the sequences that wait or run; the bare base is none."""
        with self._wake:
            sequences = [sequence for base in bases for sequence in self._scheduler.sequences(base)]
        return {sequence.adapter for sequence in sequences if sequence.adapter is not BARE}

    def _leaving_bytes(self, base: str) -> int:
        """What was evicted, replaced or deleted and is still used by requests."""
        return sum(a.nbytes for a in self._adapters_in_use([base]) & self.adapters.leaving())

    def _names_in_use(self) -> tuple[list[str], list[str]]:
        """Names of the adapters that running and that waiting sequences use."""
        with self._wake:
            running = {sequence.adapter.digest for sequence in self._scheduler.running()}
            waiting = {sequence.adapter.digest for sequence in self._scheduler.waiting()}
        served = self.adapters.all()
        return (
            [adapter.name for adapter in served if adapter.digest in running],
            [adapter.name for adapter in served if adapter.digest in waiting],
        )

    def _watch(self, base: str) -> None:
        runner = self.bases[base].runner
        self.metrics.watch_base(
            base,
            waiting=lambda: self._scheduler.num_waiting(base),
            running=lambda: self._scheduler.num_running(base),
            registered=lambda: self.adapters.count(base),
            resident=lambda: len(self.adapters.residents(base)),
            pages={
                "used": lambda: runner.num_pages - runner.num_free_pages,
                "kept": lambda: runner.num_kept_pages,
                "free": lambda: runner.num_free_pages - runner.num_kept_pages,
            },
            memory={
                "weights": lambda: self.bases[base].model.nbytes,
                "adapters": lambda: sum(served.nbytes for served in self.adapters.residents(base)),
                "leaving_adapters": lambda: self._leaving_bytes(base),
                "kv_cache": lambda: runner.cache_bytes,
            },
        )


def _dispatch(updates: Iterable[Update]) -> None:
    for update in updates:
        update.sequence.sink(update)
