"""How a version is loaded: its files are copied, read, checked, and tried out before it serves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from molex.adapter import Adapter
from molex.adapter_file import AdapterFiles, read_files
from molex.errors import AdapterError
from server.auth.caller import Caller
from server.catalogue.records import AdapterRecord, Facts, State, Version
from server.errors import ErrorKind, ServiceError, adapter_not_found, internal_error
from server.registry.registry import UPLOAD, Registry
from server.registry.remote import is_remote
from server.registry.warm_up import warm_up
from server.served import tenant_of
from server.sources import Fitted

GAP_SECONDS = 0.05
"""How long each stage of a load waits for a gap between the requests."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a caller wants to be loaded. `digest` is known of uploads."""

    name: str
    source: str
    base: str | None
    pinned: bool
    digest: str | None = None


@dataclass(frozen=True)
class Load:
    """A load under way, or one that has ended."""

    request: Request
    number: int
    """Of the version."""
    new: bool
    """Whether nothing was served under the name before."""
    task: asyncio.Task[None]

    async def wait(self, seconds: float | None) -> bool:
        """Wait for its end, at most so long; whether it has ended. Raises ServiceError where it failed."""
        await asyncio.wait({self.task}, timeout=seconds)
        if self.task.cancelled():
            raise adapter_not_found(self.request.name)
        if self.task.done():
            self.task.result()
        return self.task.done()


class Loads:
    """The loads of one server, one at a time for each name, some at a time altogether.

    A version is registered in the catalogue before its load is accepted, so that a load survives the end of
    the process: the next one begins it anew.
    """

    def __init__(self, registry: Registry) -> None:
        engine = registry.engine
        self._registry = registry
        self._engine = engine
        self._loads: dict[str, Load] = {}
        self._slots = asyncio.Semaphore(engine.settings.pool_threads)
        self._remote_slots = asyncio.Semaphore(engine.settings.pool_threads)
        """For loads that wait for sources elsewhere: they hold up no others."""

    def resume(self) -> None:
        """Begin the loads again that had not ended when the process before this one did."""
        for record in self._registry.records.values():
            version = record.newest
            if version is not None and version.under_way and self._can_load(version):
                request = Request(record.name, version.source, version.base, version.pinned, version.digest)
                self._start(request, version)

    def _can_load(self, version: Version) -> bool:
        """Not what was sent to another server, which has the files and begins anew itself."""
        return version.digest is None or version.digest in self._registry.storage

    async def stop(self) -> None:
        """Break off what is under way."""
        await self._end(self._loads.values())

    async def remove(self, caller: Caller, name: str) -> None:
        """Forget an adapter of the caller's own with all its versions; requests in flight finish."""
        if load := self._loads.get(self._registry.own(caller, name)):
            await self._end([load])
        await self._registry.remove(caller, name)

    async def remove_version(self, caller: Caller, name: str, number: int) -> None:
        """Forget a version. Raises ServiceError (409) where it is in use."""
        full_name = self._registry.own(caller, name)
        load = self._loads.get(full_name)
        if load is not None and load.number == number:
            await self._end([load])
            # It may have come to its end just before.
            await self._registry.change(self._registry.catalogue.find(full_name))
        await self._registry.remove_version(caller, name, number)

    async def from_source(
        self, caller: Caller, name: str, source: str, base: str | None, *, pinned: bool
    ) -> Load:
        """Begin to load what a caller names by its source. Raises ServiceError where it may not."""
        request = Request(caller.own_name(name), source, base, pinned)
        self._engine.adapters.check_name(request.name, base)
        tenant = tenant_of(request.name)
        if is_remote(source):
            self._registry.remote.check(source, tenant)
        else:
            await self._engine.loader.run(self._engine.adapters.sources.resolve, source, tenant)
        return await self._begin(request, caller.actor)

    async def from_files(
        self, caller: Caller, name: str, files: AdapterFiles, base: str | None, *, pinned: bool
    ) -> Load:
        """Begin to load what a caller has sent, once it is stored. Raises ServiceError."""
        full_name = caller.own_name(name)
        self._engine.adapters.check_name(full_name, base)
        if not self._registry.takes_uploads:
            message = "uploads would be lost when this server ends: start it with --storage"
            raise ServiceError(ErrorKind.FORBIDDEN_SOURCE, message)
        digest = await self._engine.loader.run(lambda: files.digest)
        try:
            with self._registry.hold(digest):
                await self._engine.loader.run(self._registry.storage.put, files)
                return await self._begin(Request(full_name, UPLOAD, base, pinned, digest), caller.actor)
        except ServiceError:
            await self._registry.collect()
            raise

    async def _begin(self, request: Request, actor: str) -> Load:
        registry = self._registry
        await self._engine.idle(GAP_SECONDS)
        async with registry.changing:
            if load := self._loads.get(request.name):
                if load.request == request:
                    return load
                message = f"a load of {request.name!r} is under way: wait until it has ended"
                raise ServiceError(ErrorKind.LOAD_IN_PROGRESS, message, param="name", retry_after=1)
            if request.name not in registry.records:
                self._engine.adapters.check_count(len(self._loads))
            record = await registry.catalogue.register(
                request.name,
                source=request.source,
                base=request.base,
                digest=request.digest,
                pinned=request.pinned,
                actor=actor,
            )
            registry.publish(record)
            return self._start(request, record.versions[-1])

    def _start(self, request: Request, version: Version) -> Load:
        new = request.name not in self._engine.adapters
        load = Load(request, version.number, new, asyncio.create_task(self._run(request, version)))
        self._loads[request.name] = load
        load.task.add_done_callback(lambda _: self._ended(load))
        return load

    def _ended(self, load: Load) -> None:
        del self._loads[load.request.name]
        if not load.task.cancelled():
            load.task.exception()  # Nobody may be left to look at it, which asyncio would complain about.

    async def _end(self, loads: Iterable[Load]) -> None:
        tasks = [load.task for load in loads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, request: Request, version: Version) -> None:
        """Load a version. A failure leaves what is served, and the catalogue says why."""
        try:
            async with self._remote_slots if _is_fetched(request) else self._slots:
                self._registry.loading[request.name] = version.number
                await self._load(request, version)
        except ServiceError as error:
            await self._failed(request, version, error)
            raise
        except Exception as error:
            log.exception("the load of %r failed", request.name)
            failure = internal_error()
            await self._failed(request, version, failure)
            raise failure from error
        finally:
            self._registry.loading.pop(request.name, None)

    async def _load(self, request: Request, version: Version) -> None:
        registry, store = self._registry, self._engine.adapters
        files, source, (base, adapter, imprint) = await self._read(request)
        store.check_room(request.name, adapter.nbytes, pinned=request.pinned)
        await warm_up(self._engine, base, adapter, tenant_of(request.name) or None)
        with registry.hold(files.digest):
            await self._engine.idle(GAP_SECONDS)
            await self._engine.loader.run(registry.storage.put, files)
            await self._engine.idle(GAP_SECONDS)
            async with registry.changing:
                facts = _facts(base, adapter, files)
                if not _is_kept(registry.records.get(request.name), facts):
                    store.check_count()
                record = await registry.catalogue.finish(request.name, version.number, source, facts)
                served = registry.publish(record, loaded=True)
        if served is not None and served.digest == adapter.digest:
            store.remember(served, imprint)
            store.keep(served, adapter)
            store.count_load(served)

    async def _read(self, request: Request) -> tuple[AdapterFiles, str, Fitted]:
        """The files of a version, its source from now on, and the adapter in them. Raises ServiceError."""
        loader, sources = self._engine.loader, self._engine.adapters.sources
        if _is_fetched(request):
            files, source = await self._registry.fetch(request.source)
            return files, source, await loader.run(sources.fit, files, request.base)
        await self._engine.idle(GAP_SECONDS)
        files, fitted = await loader.run(self._read_local, request)
        return files, request.source, fitted

    def _read_local(self, request: Request) -> tuple[AdapterFiles, Fitted]:
        """Files of the storage, or of a folder that a caller has named, and the adapter in them; blocks."""
        sources = self._engine.adapters.sources
        if request.digest is None:
            folder = sources.resolve(request.source, tenant_of(request.name))
            files = sources.copy(folder, self._engine.settings.max_adapter_bytes)
        else:
            try:
                files = read_files(self._registry.storage.path(request.digest))
            except AdapterError as error:
                raise ServiceError(ErrorKind.BAD_ADAPTER, str(error), param=error.subject) from error
        return files, sources.fit(files, request.base)

    async def _failed(self, request: Request, version: Version, error: ServiceError) -> None:
        registry = self._registry
        self._engine.adapters.count_refusal(request.name, request.base, error)
        reason = error.message.replace("\0", "\\0")
        try:
            await registry.change(registry.catalogue.fail(request.name, version.number, reason))
        except ServiceError:
            # In the catalogue it is still under way, and the next process begins it anew.
            log.exception("the catalogue does not know that the load of %r failed", request.name)
            self._note(request.name, replace(version, state=State.FAILED, reason=reason))
        await registry.collect()

    def _note(self, name: str, version: Version) -> None:
        if record := self._registry.records.get(name):
            self._registry.records[name] = record.having(version)


def _is_fetched(request: Request) -> bool:
    return request.digest is None and is_remote(request.source)


def _facts(base: str, adapter: Adapter, files: AdapterFiles) -> Facts:
    return Facts(
        base=base,
        digest=adapter.digest,
        size=adapter.nbytes,
        kind=adapter.kind,
        task=adapter.task_type,
        labels=adapter.id2label,
        config=json.dumps(json.loads(files.config)),
    )


def _is_kept(record: AdapterRecord | None, facts: Facts) -> bool:
    return record is not None and any(version.facts == facts for version in record.versions)
