"""The adapters that are being served, by name: all of them registered, some of them in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from weakref import WeakKeyDictionary

from molex.adapter import Adapter
from molex.adapter_file import CONFIG_NAME
from molex.errors import AdapterError
from molex.imprint import Imprint
from molex.lora import LoraWeights
from molex.model import MolexModel
from server.errors import ErrorKind, ServiceError, adapter_not_found
from server.metrics import Metrics
from server.residents import Residents
from server.served import ServedAdapter
from server.settings import FULL_NAME_PATTERN, Settings
from server.sources import Sources

UNKNOWN_BASE = "unknown"

log = logging.getLogger(__name__)


class AdapterStore:
    """What is served under which name, and which of it is in memory; from any thread.

    `NAME` is the current version of an adapter, `NAME@REFERENCE` the one of a number or an alias. Everything
    is read and validated before the table is touched, and each name is swapped in one assignment: requests
    see the old version or the new one. Those admitted earlier keep the weights they hold. What was evicted is
    read again from its folder, and served only if the digest is still the same.
    """

    def __init__(self, models: Mapping[str, MolexModel], settings: Settings, metrics: Metrics) -> None:
        self._models = models
        self.sources = Sources(models, settings.http_root)
        self._settings = settings
        self._metrics = metrics
        self._served: dict[str, ServedAdapter] = {}
        """The current version of each adapter, by name."""
        self._references: dict[str, dict[str, ServedAdapter]] = {}
        """All versions of each adapter, by number and alias."""
        self._pinned: dict[str, ServedAdapter] = {}
        self._imprints: WeakKeyDictionary[ServedAdapter, Imprint] = WeakKeyDictionary()
        """Of files that were read in this process, so that they are read again with less work."""
        self._residents: Residents[ServedAdapter] = Residents(
            settings.max_resident_adapters, settings.max_resident_bytes
        )
        self._lock = RLock()
        for model in models.values():
            if model.bank is not None:
                model.bank.pinned = self._pinned_factors

    def watch_use(self, in_use: Callable[[], Set[Adapter]]) -> None:
        """Never evict what this function returns: the adapters of admitted requests."""
        self._residents.in_use = in_use

    def find(self, name: str) -> ServedAdapter | None:
        """What a name means, with or without a version."""
        name, at, reference = name.partition("@")
        return self._references.get(name, {}).get(reference) if at else self._served.get(name)

    def get(self, name: str) -> ServedAdapter:
        """Raises ServiceError (404) for an unknown name."""
        served = self.find(name)
        if served is None:
            raise adapter_not_found(name)
        return served

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def all(self) -> list[ServedAdapter]:
        """Every adapter in its current version, by name."""
        return sorted(self._served.copy().values(), key=lambda served: served.name)

    def versions(self, name: str) -> set[ServedAdapter]:
        """All versions of an adapter."""
        return set(self._references.get(name, {}).values())

    def __len__(self) -> int:
        """All versions of all adapters."""
        return sum(len(set(references.values())) for references in self._references.copy().values())

    def count(self, base: str) -> int:
        """How many are registered on a base."""
        return sum(served.base == base for served in self._served.copy().values())

    def residents(self, base: str) -> list[ServedAdapter]:
        """Those of a base whose weights are in memory."""
        with self._lock:
            return [served for served in self._residents if served.base == base]

    def is_resident(self, served: ServedAdapter) -> bool:
        with self._lock:
            return served in self._residents

    def leaving(self) -> set[Adapter]:
        """Weights that requests still use, but that no later request will find in memory."""
        with self._lock:
            return self._residents.leaving()

    def weights(self, served: ServedAdapter) -> Adapter | None:
        """The weights for a request, if they are in memory."""
        with self._lock:
            return self._residents.get(served)

    def load(
        self, name: str, folder: Path, base: str | None = None, *, pinned: bool = False, evict: bool = True
    ) -> tuple[ServedAdapter, bool]:
        """Read a folder in place and serve it as `name`; returns it, and whether the name is new.

        Its weights stay in memory where there is room; `evict` makes room at the cost of the least popular.
        Blocks for the time of reading: call it on a pool thread. Without `base` the base that the adapter
        fits is found. Raises ServiceError naming the tensor or field at fault.
        """
        try:
            self.check_name(name, base)
            fitting, adapter, imprint = self.sources.read(folder, base)
            served = ServedAdapter(
                name=name,
                base=fitting,
                folder=folder,
                source=folder.name,
                config=adapter.config,
                digest=adapter.digest,
                labels=adapter.id2label,
                nbytes=adapter.nbytes,
                pinned=pinned,
            )
            self.remember(served, imprint)
            created = self._swap_in(served, adapter, evict=evict)
        except ServiceError as error:
            self.count_refusal(name, base, error)
            raise
        self.count_load(served)
        return served, created

    def count_load(self, served: ServedAdapter) -> None:
        self._metrics.adapter_load(served.base, "loaded")
        log.info("adapter %r loaded on base %s, %s", served.name, served.base, served.digest)

    def count_refusal(self, name: str, base: str | None, error: ServiceError) -> None:
        label = base if base is not None and base in self._models else UNKNOWN_BASE
        self._metrics.adapter_load(label, "refused")
        log.warning("adapter %r refused: %s", name, error.message)

    def publish(self, current: ServedAdapter, references: Mapping[str, ServedAdapter]) -> None:
        """Serve a name as its versions are from now on, all of them at once."""
        with self._lock:
            before = self._references.get(current.name, {})
            self._served[current.name] = current
            self._references[current.name] = dict(references)
            self._pinned.pop(current.name, None)
            if current.pinned:
                self._pinned[current.name] = current
            same_files = {(s.version, s.base, s.digest): s for s in references.values()}
            for served in set(before.values()).difference(references.values()):
                if successor := same_files.get((served.version, served.base, served.digest)):
                    self._residents.hand_over(served, successor)
                    self.remember(successor, self._imprints.get(served))
                else:
                    self._residents.discard(served)

    def keep(self, served: ServedAdapter, adapter: Adapter, *, evict: bool = True) -> bool:
        """Keep weights that have been read in memory, if there is room; whether there was."""
        with self._lock:
            if served in self._residents:
                return True
            evicted = self._residents.reserve(served, evict=evict)
            if evicted is not None:
                self._residents.add(served, adapter)
        self._count_evictions(evicted or [])
        return evicted is not None

    def remember(self, served: ServedAdapter, imprint: Imprint | None) -> None:
        """Keep what tells the files of an adapter when they are read again."""
        if imprint is not None:
            self._imprints[served] = imprint

    def remove(self, name: str) -> ServedAdapter:
        """Stop serving all versions of a name; requests in flight finish. Raises ServiceError (404)."""
        with self._lock:
            current = self.get(name)
            del self._served[name]
            self._pinned.pop(name, None)
            for served in set(self._references.pop(name).values()):
                self._residents.discard(served)
        log.info("adapter %r removed", name)
        return current

    def load_folder(self, folder: Path) -> dict[str, str]:
        """Load every adapter folder in `folder` under its own name, several at a time.

        Weights stay in memory as long as there is room. Returns the refused ones with the reason: one
        tenant's bad file keeps nobody else from being served.
        """
        folders = [config.parent for config in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
        with ThreadPoolExecutor(self._settings.pool_threads) as pool:
            reasons = pool.map(self._try_load, folders)
            named = {path.name: reason for path, reason in zip(folders, reasons, strict=True)}
        return {name: reason for name, reason in named.items() if reason is not None}

    def _try_load(self, folder: Path) -> str | None:
        """The reason for which a folder is refused."""
        try:
            self.load(folder.name, folder, evict=False)
        except ServiceError as error:
            return error.message
        return None

    def reserve(self, served: ServedAdapter) -> bool:
        """Make room for weights that were evicted. Every True is to be followed by `read_again`.

        False where those in use leave no room for now. Raises ServiceError where there will never be any.
        """
        with self._lock:
            evicted = self._residents.reserve(served)
        if evicted is None:
            self.check_room(served.name, served.nbytes, pinned=served.pinned)
            return False
        self._count_evictions(evicted)
        return True

    def read(self, served: ServedAdapter) -> Adapter:
        """Read the folder of an adapter. Blocks. Raises ServiceError (409), as `read_again` does."""
        try:
            _, adapter, imprint = self.sources.read_again(
                served.folder, served.base, served.digest, self._imprints.get(served)
            )
        except AdapterError as error:
            raise _unavailable(served, error) from error
        self.remember(served, imprint)
        return adapter

    def read_again(self, served: ServedAdapter) -> Adapter:
        """Read the folder of an adapter that was evicted. Blocks; to be called on a pool thread.

        Raises ServiceError (409) where the files have changed or cannot be read.
        """
        adapter = None
        try:
            adapter = self.read(served)
        finally:
            with self._lock:
                if adapter is not None and self._is_served(served):
                    adapter = self._residents.add(served, adapter)
                else:
                    # Not read, or replaced or removed in the meantime: then those who ask are its last.
                    self._residents.discard(served)
        return adapter

    def check_name(self, name: str, base: str | None) -> None:
        if not re.fullmatch(FULL_NAME_PATTERN, name):
            message = f"{name!r} is no adapter name: use letters, digits, '.', '_' and '-'"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="name")
        # A tenant's own callers leave the tenant out of the name.
        if (short := name.rpartition("/")[2]) in self._models:
            message = f"{short!r} is the name of a base"
            raise ServiceError(ErrorKind.NAME_TAKEN, message, param="name")
        if base is not None and base not in self._models:
            message = f"no base is named {base!r}; there are {', '.join(self._models)}"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="base")

    def check_count(self, coming: int = 0) -> None:
        """Raises ServiceError where there is no place for one more version beside those that are coming."""
        if (count := len(self) + coming) >= self._settings.max_adapters:
            message = f"{count} adapters are loaded, which is the limit"
            raise ServiceError(ErrorKind.TOO_MANY_ADAPTERS, message)

    def check_room(self, name: str, nbytes: int, *, pinned: bool) -> None:
        """Raises ServiceError where weights will never fit into memory beside those that are pinned."""
        settings = self._settings
        others = [other for pinned_name, other in self._pinned.copy().items() if pinned_name != name]
        total = nbytes + sum(other.nbytes for other in others)
        # One place is left for all that are not pinned.
        count = len(others) + 1 + pinned
        if total > settings.max_resident_bytes or count > settings.max_resident_adapters:
            message = (
                f"no room in memory for the adapter {name!r} of {nbytes} bytes beside "
                f"{len(others)} pinned ones: max_resident_bytes is {settings.max_resident_bytes}, "
                f"max_resident_adapters {settings.max_resident_adapters}"
            )
            raise ServiceError(ErrorKind.TOO_MANY_ADAPTERS, message)

    def _swap_in(self, served: ServedAdapter, adapter: Adapter, *, evict: bool) -> bool:
        with self._lock:
            created = served.name not in self._served
            if created:
                self.check_count()
            self.check_room(served.name, served.nbytes, pinned=served.pinned)
            self.publish(served, {str(served.version): served})
            self.keep(served, adapter, evict=evict)
        return created

    def _pinned_factors(self) -> set[LoraWeights]:
        with self._lock:
            return {adapter.lora for adapter in self._residents.pinned()}

    def _is_served(self, served: ServedAdapter) -> bool:
        return self.find(f"{served.name}@{served.version}") is served

    def _count_evictions(self, evicted: Collection[ServedAdapter]) -> None:
        for served in evicted:
            self._metrics.adapter_eviction(served.base)
            log.debug("adapter %r evicted", served.name)


def _unavailable(served: ServedAdapter, error: AdapterError) -> ServiceError:
    """Why an adapter cannot be brought back, and what does."""
    message = (
        f"adapter {served.name!r} is not in memory and cannot be read again: {error}; "
        f"put its files back, or load what is there with PUT /v1/adapters/{served.name}"
    )
    return ServiceError(ErrorKind.ADAPTER_UNAVAILABLE, message, param="model")
