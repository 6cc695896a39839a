"""The one thread boundary: requests come in on the event loop, steps run on the worker thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from functools import partial
from threading import Condition, Event, Thread
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch

from molex.adapter import BARE, Adapter
from molex.native.threads import spread_threads
from molex.threads import release_helpers
from server.adapters import AdapterStore
from server.base import Base, load_base
from server.errors import internal_error, stopping_error, stuck_error
from server.heartbeat import LOOK_SECONDS, Heartbeat, cpu_clock, cpu_seconds
from server.loader import Loader
from server.metrics import Metrics
from server.pool import Pool
from server.recording import record
from server.runner import StepOutput
from server.scheduler import Batch, Scheduler
from server.sequence import Sequence, Update
from server.settings import Settings
from server.submission import Submission, in_time

P = ParamSpec("P")
T = TypeVar("T")
IDLE_SECONDS = 0.25
"""A worker without work looks for some this often, which shows that it is there, within any patience."""
JOIN_SECONDS = 10
"""How long a worker may take to end when the engine stops; one that is stuck never does."""
WARM_ROWS = 512
"""Everyday batches: 0.3 s and 80 to 140 MB at start for the demo encoder.

Up to 2,048 rows it would be 1 to 2 s and twice the memory.
"""
log = logging.getLogger(__name__)


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
        self._wake = Condition()
        self._stopping = False
        self._warm = Event()
        self._heartbeat = Heartbeat(settings.max_stall_seconds)
        self._watch: asyncio.Task[None] | None = None
        self._rounds = 0
        self._cpu_clock: int | None = None
        self._worker = Thread(target=self._work, name="worker", daemon=True)
        self._pool = Pool(settings.pool_threads, "pool")
        self.loader = Loader(adapters, metrics, threads=settings.pool_threads)
        adapters.watch_use(lambda: self._adapters_in_use(bases))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        """Set and cleared on the event loop, as it learns of work and of its end."""
        self._idle.set()
        for name in bases:
            self._report(name)
        metrics.watch_adapters(settings.max_resident_adapters, self._names_in_use)
        if settings.device != "cpu":
            metrics.watch_gpu(
                allocated=partial(torch.cuda.memory_allocated, settings.device),
                peak=partial(torch.cuda.max_memory_allocated, settings.device),
            )

    @classmethod
    def load(cls, settings: Settings) -> Engine:
        """Load the bases that the settings name. Raises BaseModelError."""
        bases = {name: load_base(name, source, settings) for name, source in settings.bases.items()}
        metrics = Metrics()
        adapters = AdapterStore({name: base.model for name, base in bases.items()}, settings, metrics)
        return cls(settings, bases, adapters, metrics)

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self._worker.is_alive() and not (self._heartbeat.stuck or self.draining)

    @property
    def lost(self) -> bool:
        """Whether the worker has died or been stuck for so long that this process had better end."""
        return self._heartbeat.lost

    async def start(self) -> None:
        """Begin to work; returns once the kernels of everyday batches are compiled."""
        self._loop = asyncio.get_running_loop()
        # This thread has loaded the bases. From now on only the worker should have helpers.
        release_helpers()
        self._worker.start()
        await asyncio.to_thread(self._warm.wait)
        self._watch = asyncio.create_task(self._watch_worker())

    async def stop(self) -> None:
        """End the worker after its current step and answer what is left with 503."""
        self.draining = True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._watch is not None:
            self._watch.cancel()
        if self._worker.is_alive():
            await asyncio.to_thread(self._worker.join, JOIN_SECONDS)
        self._pool.close()
        self.loader.close()

    async def in_pool(
        self, deadline: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run what blocks on a pool thread. Raises ServiceError (504) at the deadline, as in `submit`."""
        async with in_time(deadline):
            return await self._pool.run(function, *args, **kwargs)

    def submit(self, sequences: Seq[Sequence], deadline: float, *, beyond_limit: bool = False) -> Submission:
        """Admit the sequences of one request, all of them on one base.

        At `deadline`, on the clock of the event loop, what has not ended is dropped and fails with 504.
        Raises ServiceError: 429 where the queue is full, unless this may go `beyond_limit`; 503 where the
        worker has stopped or is stuck.
        """
        submission = Submission(sequences, self._cancel)
        now = perf_counter()
        for sequence in sequences:
            sequence.timings.queued = now
        with self._wake:
            if self._stopping:
                raise stopping_error()
            if self._heartbeat.stuck:
                raise stuck_error()
            self._scheduler.add(sequences, beyond_limit=beyond_limit)
            self._idle.clear()
            self._wake.notify()
        submission.expire_at(deadline)
        return submission

    async def idle(self, at_most: float) -> None:
        """Wait until the worker has nothing to do, for `at_most` so many seconds.

        What is in no hurry begins then: a pass is as slow as the slowest of its threads, and so waits for
        whatever else takes a CPU from it.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await self._idle.wait()

    def _cancel(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            sequence.cancelled = True
        with self._wake:
            self._wake.notify()

    def _work(self) -> None:
        self._cpu_clock = cpu_clock()
        try:
            if any(base.model.on_kernels for base in self.bases.values()):
                spread_threads()
            self._warm_up()
            while self._step():
                pass
        except Exception:
            log.critical("the worker thread died", exc_info=True)
        finally:
            self._warm.set()
            self._abandon()

    def _warm_up(self) -> None:
        """Compile kernels where they run: each thread, and each of its helpers, has its own."""
        for base in self.bases.values():
            base.model.warm_up(min(WARM_ROWS, self.settings.max_batch_tokens))
        self._warm.set()

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
                self._rounds += 1
                self._drop_cancelled()
                if batch := self._scheduler.schedule():
                    self._mark_started(batch)
                    return batch
                self._wake.wait(IDLE_SECONDS)
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
        record(self.metrics, batch.base, output)
        with self._wake:
            self._scheduler.postprocess(batch)
        self._deliver(output.updates)

    def _deliver(self, updates: Iterable[Update]) -> None:
        """Hand updates to the event loop, all of a step at once."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._dispatch, list(updates))
        except RuntimeError:
            log.warning("updates are lost: the event loop has closed")

    def _dispatch(self, updates: Iterable[Update]) -> None:
        for update in updates:
            update.sequence.sink(update)
        with self._wake:
            if not self._scheduler.has_work:
                self._idle.set()

    async def _watch_worker(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            runners = [base.runner for base in self.bases.values()]
            progress = self._rounds + sum(runner.progress for runner in runners)
            self._heartbeat.look(progress, cpu_seconds(self._cpu_clock))
            if self._heartbeat.stuck:
                self._give_up()

    def _give_up(self) -> None:
        """Answer everything that waits on a worker that is stuck; should it go on, it drops all of it."""
        with self._wake:
            sequences = [*self._scheduler.running(), *self._scheduler.waiting()]
        left = [sequence for sequence in sequences if not sequence.cancelled]
        if left:
            log.critical("the worker thread is stuck; %d sequences get 503", len(left))
        self._cancel(left)
        self._dispatch(Update(sequence, error=stuck_error()) for sequence in left)

    def _abandon(self) -> None:
        """Answer everything that is left, when the worker ends."""
        with self._wake:
            error = stopping_error() if self._stopping else internal_error()
            self._stopping = True
            left = self._scheduler.drop_all()
        self._deliver(Update(sequence, error=error) for sequence in left)

    def _adapters_in_use(self, bases: Iterable[str]) -> set[Adapter]:
        """Those of the sequences that wait or run; the bare base is none."""
        with self._wake:
            sequences = [sequence for base in bases for sequence in self._scheduler.sequences(base)]
        return {sequence.adapter for sequence in sequences if sequence.adapter is not BARE}

    def _leaving_bytes(self, base: str) -> int:
        """What was evicted, replaced or deleted and is still used by requests."""
        return sum(a.nbytes for a in self._adapters_in_use([base]) & self.adapters.leaving())

    def _num_waiting(self, base: str) -> int:
        with self._wake:
            return self._scheduler.num_waiting(base)

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

    def _report(self, base: str) -> None:
        runner = self.bases[base].runner
        self.metrics.watch_base(
            base,
            waiting=lambda: self._num_waiting(base),
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
                "bank": lambda: self.bases[base].model.bank_bytes,
                "leaving_adapters": lambda: self._leaving_bytes(base),
                "kv_cache": lambda: runner.cache_bytes,
            },
        )
