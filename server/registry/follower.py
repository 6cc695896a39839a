"""What other servers change in a catalogue that this one shares with them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from molex.adapter import Adapter
from server.catalogue.records import AdapterRecord, State, Version
from server.errors import ErrorKind, ServiceError
from server.registry.registry import Registry
from server.registry.remote import is_remote

RETRY_SECONDS = 10.0
"""Until a source or a database that was down is asked again."""

log = logging.getLogger(__name__)


class Follower:
    """Serves adapters as the catalogue has them, whichever server has changed them there.

    A version that became current elsewhere serves here once its weights are in memory; until then, and where
    they cannot be had, the one before goes on. Used on the event loop alone.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._engine = registry.engine
        self._changed: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(registry.engine.settings.pool_threads)

    def changed(self, subject: str) -> None:
        """Look at what the catalogue says of `adapter:NAME`. What this server has changed, it knows."""
        kind, _, name = subject.partition(":")
        if kind == "adapter":
            self._changed.add(name)
            if name not in self._tasks:
                self._tasks[name] = asyncio.create_task(self._follow(name))

    async def stop(self) -> None:
        """Break off what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, name: str) -> None:
        try:
            while name in self._changed:
                self._changed.remove(name)
                try:
                    async with self._slots:
                        await self._look(name)
                except ServiceError as error:
                    log.warning("adapter %r is not as the catalogue has it: %s", name, error.message)
                    if error.retry_after is not None:
                        self._changed.add(name)
                        await asyncio.sleep(RETRY_SECONDS)
        except Exception:
            log.exception("adapter %r cannot be brought to what the catalogue has", name)
        finally:
            del self._tasks[name]

    async def _look(self, name: str) -> None:
        """Serve what the catalogue says now. Raises ServiceError where that cannot be had."""
        before = self._engine.adapters.versions(name)
        try:
            await self._change(name)
        finally:
            # Behind the changes, which wait for nobody's loads.
            if leaving := before - self._engine.adapters.versions(name):
                await self._registry.collect(leaving)

    async def _change(self, name: str) -> None:
        registry = self._registry
        async with registry.changing:
            record = await registry.catalogue.find(name)
            if record == registry.records.get(name) and name not in registry.unserved:
                return
            current = _current(record)
            if record is None or current is None or self._is_served(name, current):
                registry.unserved.pop(name, None)
                self._show(name, record)
                return
        try:
            adapter = await self._read(record, current)
        except ServiceError as error:
            async with registry.changing:
                record = await registry.catalogue.find(name)
                registry.unserved[name] = replace(current, state=State.FAILED, reason=error.message)
                self._show(name, record)
            raise
        async with registry.changing:
            if await registry.catalogue.find(name) == record:
                self._show(name, record, adapter)
            else:
                self._changed.add(name)

    def _is_served(self, name: str, version: Version) -> bool:
        served = self._engine.adapters.find(name)
        return served is not None and (served.version, served.digest) == (version.number, version.digest)

    async def _read(self, record: AdapterRecord, version: Version) -> Adapter:
        """The weights of a version, from memory, the disk or its source. Raises ServiceError."""
        served = self._registry.served(record, version)
        if served is None:
            message = f"version {version.number} is for a base that this server has not"
            raise ServiceError(ErrorKind.ADAPTER_UNAVAILABLE, message)
        if weights := self._engine.adapters.weights(served):
            return weights
        if served.digest not in self._registry.storage and not is_remote(served.source):
            message = f"the files of version {version.number} are on the server that loaded it alone"
            raise ServiceError(ErrorKind.ADAPTER_UNAVAILABLE, message)
        await self._registry.restore(served)
        return await self._engine.loader.run(self._engine.adapters.read, served)

    def _show(self, name: str, record: AdapterRecord | None, adapter: Adapter | None = None) -> None:
        """Serve an adapter as it is in the catalogue, with the weights of its current version."""
        store = self._engine.adapters
        if record is None:
            self._registry.forget(name)
        else:
            served = self._registry.publish(record, loaded=adapter is not None)
            if served is not None and adapter is not None:
                store.keep(served, adapter)
                store.count_load(served)


def _current(record: AdapterRecord | None) -> Version | None:
    return None if record is None or record.current is None else record.find(record.current)
