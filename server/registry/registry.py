"""Adapters as a resource: what the catalogue says of them, and how that comes to be served."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from molex.adapter_file import AdapterFiles
from molex.config_file import parse_config
from molex.errors import AdapterError
from server.auth.caller import Caller
from server.catalogue.adapters import AdapterCatalogue
from server.catalogue.catalogue import Catalogue
from server.catalogue.database import migrate
from server.catalogue.records import AdapterRecord, State, Version
from server.catalogue.url import parse_url
from server.engine import Engine
from server.errors import ErrorKind, ServiceError, adapter_not_found
from server.pool import Pool
from server.registry.files import fetchable, needed
from server.registry.remote import Remote, is_remote
from server.registry.storage import Storage
from server.served import ServedAdapter, tenant_of

UPLOAD = "upload"
"""The source of what came in the body of a request."""
FETCH_SECONDS = 300
"""How long a source may take for the files of an adapter."""

log = logging.getLogger(__name__)


class Registry:
    """The adapters of one server. Used on the event loop alone.

    The catalogue is where they are kept; `records` is what it said last, so that requests ask no database.
    Without a database there is a catalogue in the storage folder, which lasts as long as that.
    """

    def __init__(self, engine: Engine, catalogue: Catalogue | None) -> None:
        settings = engine.settings
        self.engine = engine
        self.storage = Storage(settings.storage, settings.max_storage_bytes)
        self.remote = Remote(settings.sources, settings.max_adapter_bytes)
        self.records: dict[str, AdapterRecord] = {}
        self.loading: dict[str, int] = {}
        """The number of the version that is being loaded here; in the catalogue it is only registered."""
        self.unserved: dict[str, Version] = {}
        """As failed, versions that are current because other servers could load them."""
        self.changing = asyncio.Lock()
        """Held from a change of the catalogue until `records` has it."""
        self._shared = catalogue
        self._own: Catalogue | None = None
        self._held: Counter[str] = Counter()
        # Slow sources hold up no reads from the disk, and no end of the server.
        self._fetchers = Pool(settings.pool_threads, "fetcher")
        engine.loader.restore = self.restore

    async def open(self) -> None:
        """Serve what the catalogue names. Raises ServiceError (503) where it cannot be reached."""
        await asyncio.to_thread(self.storage.open)
        if self._shared is None:
            url = parse_url(f"sqlite:///{self.storage.folder.absolute()}/catalogue.db")
            await asyncio.to_thread(migrate, url)
            self._own = Catalogue(url, pepper="")
        for record in await self.catalogue.all():
            self.publish(record)
        self.storage.keep_only(self._needed())
        self.storage.evictable = self._evictable
        await self._warm_memory()

    async def close(self) -> None:
        self._fetchers.abandon()
        if self._own is not None:
            await self._own.close()
        self.storage.close()

    @property
    def catalogue(self) -> AdapterCatalogue:
        catalogue = self._shared or self._own
        assert catalogue is not None
        return AdapterCatalogue(catalogue)

    @property
    def takes_uploads(self) -> bool:
        """Whether what is uploaded lasts as long as the catalogue that names it."""
        return self.storage.lasting or self._shared is None

    def names(self, caller: Caller) -> list[str]:
        """The full names of the adapters that a caller may see, whatever their state."""
        names = {*self.records, *(served.name for served in self.engine.adapters.all())}
        return sorted(name for name in names if caller.may_see(name))

    def find(self, caller: Caller, name: str) -> str:
        """The full name of what a name means to a caller. Raises ServiceError (404)."""
        for full_name in caller.names(name):
            if full_name in self.records or full_name in self.engine.adapters:
                return full_name
        raise adapter_not_found(name)

    def seen(self, name: str) -> AdapterRecord | None:
        """An adapter as the catalogue has it, but for a version that this server loads now or cannot load."""
        record, version = self.records.get(name), self.unserved.get(name)
        if record is not None and version is None and (number := self.loading.get(name)) is not None:
            begun = (v for v in record.versions if v.number == number and v.state is State.REGISTERED)
            version = next((replace(v, state=State.LOADING) for v in begun), None)
        return record if record is None or version is None else record.having(version)

    def own(self, caller: Caller, name: str) -> str:
        """The full name of an adapter of the caller's own, which is there. Raises ServiceError."""
        full_name = caller.own_name(name)
        if full_name in self.records or full_name in self.engine.adapters:
            return full_name
        if name in self.engine.adapters:
            message = f"{name!r} is shared by the operator, who alone changes it"
            raise ServiceError(ErrorKind.FORBIDDEN_ADAPTER, message, param="name")
        raise adapter_not_found(name)

    async def rollback(self, caller: Caller, name: str, reference: int | str | None) -> str:
        """Make the version before, or that of a number or an alias, the current one; returns the full name.

        It is in memory before it is current. Raises ServiceError.
        """
        full_name = self.own(caller, name)
        number = self._previous(full_name) if reference is None else self._number(full_name, reference)
        served = self.engine.adapters.get(f"{full_name}@{number}")
        if self._is_pinned(full_name, number):
            self.engine.adapters.check_room(full_name, served.nbytes, pinned=True)
        await asyncio.shield(self.engine.loader.begin(served))
        await self.change(self.catalogue.rollback(full_name, number, actor=caller.actor), loaded=True)
        return full_name

    async def set_alias(self, caller: Caller, name: str, alias: str, reference: int | str) -> str:
        """Let an alias name a version; returns the full name of the adapter. Raises ServiceError."""
        full_name = self.own(caller, name)
        number = self._number(full_name, reference)
        await self.change(self.catalogue.set_alias(full_name, alias, number, actor=caller.actor))
        return full_name

    async def remove_alias(self, caller: Caller, name: str, alias: str) -> None:
        full_name = self.own(caller, name)
        await self.change(self.catalogue.remove_alias(full_name, alias, actor=caller.actor))

    async def remove_version(self, caller: Caller, name: str, number: int) -> None:
        """Forget a version; requests in flight finish. Raises ServiceError (409) where it is in use."""
        full_name = self.own(caller, name)
        served = self.engine.adapters.find(f"{full_name}@{number}")
        await self.change(self.catalogue.remove_version(full_name, number, actor=caller.actor))
        await self.collect(set() if served is None else {served})

    async def remove(self, caller: Caller, name: str) -> None:
        """Forget an adapter with all its versions; requests in flight finish."""
        full_name = self.own(caller, name)
        leaving = self.engine.adapters.versions(full_name)
        async with self.changing:
            if full_name in self.records:
                await self.catalogue.remove(full_name, actor=caller.actor)
            self.forget(full_name)
        await self.collect(leaving)

    def forget(self, name: str) -> None:
        """Serve no version of an adapter any more."""
        self.records.pop(name, None)
        self.unserved.pop(name, None)
        if name in self.engine.adapters:
            self.engine.adapters.remove(name)

    async def change(
        self, change: Coroutine[Any, Any, AdapterRecord | None], *, loaded: bool = False
    ) -> None:
        """Carry out a change of the catalogue, or look what it says, and serve accordingly."""
        try:
            async with self.changing:
                if (record := await change) is not None:
                    self.publish(record, loaded=loaded)
        finally:
            change.close()  # Where this was cancelled before its turn came.

    def publish(self, record: AdapterRecord, *, loaded: bool = False) -> ServedAdapter | None:
        """Serve an adapter as the catalogue has it; returns the version that its name means, if there is one.

        That is the current one where its weights are `loaded` or nothing else is kept that serves: another
        server may have made it current, and what it has loaded need not be there for this one.
        """
        self.records[record.name] = record
        references: dict[str, ServedAdapter] = {}
        for version in record.versions:
            served = self.served(record, version)
            if served is not None:
                names = [alias for alias, number in record.aliases.items() if number == version.number]
                references |= dict.fromkeys((str(version.number), *names), served)
        before = self.engine.adapters.find(record.name)
        current = references.get(str(record.current))
        if loaded:
            self.unserved.pop(record.name, None)
        elif before is not None:
            current = references.get(str(before.version), current)
        if current is not None:
            self.engine.adapters.publish(current, references)
        elif before is not None and before.version:
            self.engine.adapters.remove(record.name)
        return current

    @contextmanager
    def hold(self, digest: str) -> Iterator[None]:
        """Keep files that have no name in the catalogue yet."""
        self._held[digest] += 1
        try:
            yield
        finally:
            self._held[digest] -= 1
            self._held = +self._held

    async def collect(self, leaving: Set[ServedAdapter] = frozenset()) -> None:
        """Remove files that no version names any more, once loads that began have ended."""
        await self.engine.loader.settled(leaving)
        for digest in self.storage.digests() - self._needed():
            await self.engine.loader.run(self.storage.remove_unless, self._needed, digest)

    async def fetch(self, uri: str) -> tuple[AdapterFiles, str]:
        """As `Remote.fetch`, on a thread, and for a limited time."""
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                return await self._fetchers.run(self.remote.fetch, uri)
        except TimeoutError as error:
            message = f"{uri} could not be fetched within {FETCH_SECONDS} seconds"
            raise ServiceError(ErrorKind.SOURCE_DOWN, message, param="source", retry_after=5) from error

    async def restore(self, served: ServedAdapter) -> None:
        """Fetch the files of a version again, if they have left the disk and came from elsewhere."""
        if served.digest in self.storage:
            self.storage.touch(served.digest)
        elif served.version and is_remote(served.source):
            self.remote.check(served.source, tenant_of(served.name))
            files, _ = await self.fetch(served.source)
            if files.digest != served.digest:
                message = (
                    f"{served.source} no longer has the files of version {served.version} of {served.name!r}"
                )
                raise ServiceError(ErrorKind.ADAPTER_UNAVAILABLE, message, param="model")
            await self.engine.loader.run(self.storage.put, files)

    def _is_pinned(self, full_name: str, number: int) -> bool:
        """Whether a version is to stay in memory while it is the current one."""
        record = self.records.get(full_name)
        version = None if record is None else record.find(number)
        return version is not None and version.pinned

    def _previous(self, full_name: str) -> int:
        record = self.records.get(full_name)
        version = None if record is None else record.previous
        if version is None:
            message = f"{full_name!r} has no version before its current one"
            raise ServiceError(ErrorKind.NO_PREVIOUS_VERSION, message, param="version")
        return version.number

    def _number(self, full_name: str, reference: int | str) -> int:
        record = self.records.get(full_name)
        version = None if record is None else record.find(reference)
        if version is None:
            raise adapter_not_found(f"{full_name}@{reference}")
        return version.number

    def served(self, record: AdapterRecord, version: Version) -> ServedAdapter | None:
        """A ready version as requests find it; None on a base that this server has not."""
        facts = version.facts
        if facts is None or facts.base not in self.engine.bases:
            return None
        pinned = version.pinned and version.number == record.current
        known = self.engine.adapters.find(f"{record.name}@{version.number}")
        if known is not None and known.version == version.number and known.digest == facts.digest:
            return known if known.pinned == pinned else replace(known, pinned=pinned)
        num_layers = self.engine.bases[facts.base].model.spec.num_layers
        try:
            config = parse_config(facts.config, num_layers)
        except AdapterError as error:
            log.warning("version %d of %r no longer fits its base: %s", version.number, record.name, error)
            return None
        return ServedAdapter(
            name=record.name,
            base=facts.base,
            folder=self.storage.path(facts.digest),
            source=version.source,
            config=config,
            digest=facts.digest,
            labels=facts.labels,
            nbytes=facts.size,
            version=version.number,
            pinned=pinned,
            created=version.created,
        )

    def _needed(self) -> set[str]:
        """Digests of the files that are needed, or about to be. Called from any thread."""
        return needed(self.records.copy().values()) | set(self._held)

    def _evictable(self) -> set[str]:
        """Called from any thread."""
        return fetchable(self.records.copy().values(), self._held.copy())

    async def _warm_memory(self) -> None:
        """Read current versions from the disk into memory, as long as there is room."""
        for served in self.engine.adapters.all():
            if served.version == 0 or served.digest not in self.storage:
                continue
            try:
                adapter = await self.engine.loader.run(self.engine.adapters.read, served)
            except ServiceError as error:
                log.warning("%s", error.message)
                continue
            if not self.engine.adapters.keep(served, adapter, evict=False):
                return
