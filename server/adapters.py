"""The adapters that are being served, by name: all of them registered, some of them in memory."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from molex.adapter import Adapter
from molex.adapter_file import CONFIG_NAME
from molex.config import AdapterConfig
from molex.errors import AdapterError
from molex.model import MolexModel
from server.catalogue.records import Quota
from server.errors import ErrorKind, ServiceError, adapter_not_found
from server.metrics import Metrics
from server.residents import Residents
from server.settings import FULL_NAME_PATTERN, Settings
from server.sources import Sources

UNKNOWN_BASE = "unknown"
UNLIMITED = Quota()

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """An adapter under the name that requests call it by: all but its weights, which may not be in memory."""

    name: str
    """`TENANT/NAME`, or `NAME` alone where the operator shares it."""
    base: str
    folder: Path
    source: str
    """The folder, as its loader named it."""
    config: AdapterConfig
    digest: str
    labels: Mapping[int, str]
    nbytes: int
    """What its weights take in memory."""
    pinned: bool = False
    """Whether it stays in memory once it is there."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since the epoch."""

    @property
    def classifies(self) -> bool:
        return self.config.task_type == "SEQ_CLS"


def tenant_of(name: str) -> str:
    """The tenant in the name of an adapter; empty where the operator shares it."""
    return name.rpartition("/")[0]


class AdapterStore:
    """Registers, replaces and removes adapters, and keeps some of them in memory; from any thread.

    A registration reads and validates everything before it touches the table, and the swap is one
    assignment: requests see the old adapter or the new one. Those admitted earlier keep the weights they
    hold. What was evicted is read again from its folder, and served only if the digest is still the same.
    """

    def __init__(self, models: Mapping[str, MolexModel], settings: Settings, metrics: Metrics) -> None:
        self._models = models
        self._sources = Sources(models, settings.http_root)
        self._settings = settings
        self._metrics = metrics
        self._served: dict[str, ServedAdapter] = {}
        self._pinned: dict[str, ServedAdapter] = {}
        self._residents: Residents[ServedAdapter] = Residents(
            settings.max_resident_adapters, settings.max_resident_bytes
        )
        self._lock = Lock()

    def watch_use(self, in_use: Callable[[], Set[Adapter]]) -> None:
        """Never evict what this function returns: the adapters of admitted requests."""
        self._residents.in_use = in_use

    def get(self, name: str) -> ServedAdapter:
        """Raises ServiceError (404) for an unknown name."""
        served = self._served.get(name)
        if served is None:
            raise adapter_not_found(name)
        return served

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def all(self) -> list[ServedAdapter]:
        """Every adapter, by name."""
        return sorted(self._served.copy().values(), key=lambda served: served.name)

    def count(self, base: str) -> int:
        """How many are registered on a base."""
        return sum(served.base == base for served in self._served.copy().values())

    def residents(self, base: str) -> list[ServedAdapter]:
        """Those of a base whose weights are in memory, least recently used first."""
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

    def load_for_caller(
        self, name: str, source: str, base: str | None, quota: Quota = UNLIMITED, *, pinned: bool = False
    ) -> tuple[ServedAdapter, bool]:
        """Load an adapter that an HTTP caller names by its folder under the adapter root.

        A tenant has a root of its own, the folder in there that bears its name.
        """
        folder = self._sources.resolve(source, tenant_of(name))
        return self.load(name, folder, base, source=source, quota=quota, pinned=pinned)

    def load(
        self,
        name: str,
        folder: Path,
        base: str | None = None,
        *,
        source: str | None = None,
        quota: Quota = UNLIMITED,
        pinned: bool = False,
        evict: bool = True,
    ) -> tuple[ServedAdapter, bool]:
        """Read a folder and serve it as `name`; returns it, and whether the name is new.

        Its weights stay in memory where there is room; `evict` makes room at the cost of the least recently
        used. Blocks for the time of reading: call it on a pool thread. Without `base` the base that the
        adapter fits is found. Raises ServiceError naming the tensor or field at fault.
        """
        try:
            self._check_name(name, base)
            fitting, adapter = self._sources.read(folder, base)
            served = ServedAdapter(
                name=name,
                base=fitting,
                folder=folder,
                source=source or folder.name,
                config=adapter.config,
                digest=adapter.digest,
                labels=adapter.id2label,
                nbytes=adapter.nbytes,
                pinned=pinned,
            )
            created = self._swap_in(served, adapter, quota, evict=evict)
        except ServiceError as error:
            label = base if base is not None and base in self._models else UNKNOWN_BASE
            self._metrics.adapter_load(label, "refused")
            log.warning("adapter %r refused: %s", name, error.message)
            raise
        self._metrics.adapter_load(fitting, "loaded")
        log.info("adapter %r loaded on base %s, %s", name, fitting, adapter.digest)
        return served, created

    def remove(self, name: str) -> ServedAdapter:
        """Stop serving a name; requests in flight finish. Raises ServiceError (404)."""
        with self._lock:
            served = self.get(name)
            del self._served[name]
            self._pinned.pop(name, None)
            self._residents.discard(served)
        log.info("adapter %r removed", name)
        return served

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
            self._check_room(served)
            return False
        self._count_evictions(evicted)
        return True

    def read_again(self, served: ServedAdapter) -> Adapter:
        """Read the folder of an adapter that was evicted. Blocks; to be called on a pool thread.

        Raises ServiceError (409) where the files have changed or cannot be read.
        """
        adapter = None
        try:
            adapter = self._sources.read_again(served.folder, served.base, served.digest)
        except AdapterError as error:
            raise _unavailable(served, error) from error
        finally:
            with self._lock:
                if adapter is not None and self._served.get(served.name) is served:
                    self._residents.add(served, adapter)
                else:
                    # Not read, or replaced or removed in the meantime: then those who ask are its last.
                    self._residents.discard(served)
        return adapter

    def _check_name(self, name: str, base: str | None) -> None:
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

    def _check_room(self, served: ServedAdapter) -> None:
        """Raises ServiceError where the weights will never fit into memory beside those that are pinned."""
        settings = self._settings
        pinned = [other for name, other in self._pinned.copy().items() if name != served.name]
        nbytes = served.nbytes + sum(other.nbytes for other in pinned)
        # One place is left for all that are not pinned.
        count = len(pinned) + 1 + served.pinned
        if nbytes > settings.max_resident_bytes or count > settings.max_resident_adapters:
            message = (
                f"no room in memory for the adapter {served.name!r} of {served.nbytes} bytes beside "
                f"{len(pinned)} pinned ones: max_resident_bytes is {settings.max_resident_bytes}, "
                f"max_resident_adapters {settings.max_resident_adapters}"
            )
            raise ServiceError(ErrorKind.TOO_MANY_ADAPTERS, message)

    def _swap_in(self, served: ServedAdapter, adapter: Adapter, quota: Quota, *, evict: bool) -> bool:
        capacity = self._settings.max_adapters
        with self._lock:
            self._check_quota(served, quota)
            before = self._served.get(served.name)
            if before is None and len(self._served) >= capacity:
                message = f"{capacity} adapters are loaded, which is the limit"
                raise ServiceError(ErrorKind.TOO_MANY_ADAPTERS, message)
            self._check_room(served)
            if before is not None:
                self._residents.discard(before)
            evicted = self._residents.reserve(served, evict=evict)
            if evicted is not None:
                self._residents.add(served, adapter)
            self._served[served.name] = served
            self._pinned.pop(served.name, None)
            if served.pinned:
                self._pinned[served.name] = served
        self._count_evictions(evicted or [])
        return before is None

    def _check_quota(self, served: ServedAdapter, quota: Quota) -> None:
        """Whether the tenant has room for an adapter beside its others; waiting would not make any."""
        tenant = tenant_of(served.name)
        others = [
            other
            for other in self._served.values()
            if tenant_of(other.name) == tenant and other.name != served.name
        ]
        if quota.adapters is not None and len(others) >= quota.adapters:
            message = f"{tenant} has {len(others)} adapters, which is its limit"
            raise ServiceError(ErrorKind.ADAPTER_QUOTA, message)
        size = served.nbytes + sum(other.nbytes for other in others)
        if quota.adapter_bytes is not None and size > quota.adapter_bytes:
            message = f"the adapters of {tenant} would take {size} bytes; its limit is {quota.adapter_bytes}"
            raise ServiceError(ErrorKind.ADAPTER_QUOTA, message)

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
