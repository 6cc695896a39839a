"""The adapters that are being served, by name."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from molex.adapter import Adapter
from molex.adapter_file import read_adapter
from molex.errors import AdapterError
from molex.model import MolexModel
from server.catalogue.records import Quota
from server.errors import ErrorKind, ServiceError, adapter_not_found
from server.metrics import Metrics
from server.settings import FULL_NAME_PATTERN

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
UNKNOWN_BASE = "unknown"
UNLIMITED = Quota()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter under the name that requests call it by."""

    name: str
    """`TENANT/NAME`, or `NAME` alone where the operator shares it."""
    base: str
    adapter: Adapter
    source: str
    """Where it was loaded from, as the caller wrote it."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since the epoch."""


def tenant_of(name: str) -> str:
    """The tenant in the name of an adapter; empty where the operator shares it."""
    return name.rpartition("/")[0]


class AdapterStore:
    """Loads, replaces and removes adapters, from any thread.

    A load reads and validates everything before it touches the table, and the swap is one assignment:
    requests see the old adapter or the new one. Those admitted earlier keep the object they hold.
    """

    def __init__(
        self,
        models: Mapping[str, MolexModel],
        *,
        http_root: Path | None,
        capacity: int,
        metrics: Metrics,
    ) -> None:
        self._models = models
        self._root = None if http_root is None else http_root.resolve()
        self._capacity = capacity
        self._metrics = metrics
        self._served: dict[str, ServedAdapter] = {}
        self._lock = Lock()

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
        return sum(served.base == base for served in self._served.copy().values())

    def nbytes(self, base: str) -> int:
        """What the weights of all adapters of a base take in memory."""
        return sum(served.adapter.nbytes for served in self._served.copy().values() if served.base == base)

    def load_for_caller(
        self, name: str, source: str, base: str | None, quota: Quota = UNLIMITED
    ) -> tuple[ServedAdapter, bool]:
        """Load an adapter that an HTTP caller names by its folder under the adapter root.

        A tenant has a root of its own, the folder in there that bears its name.
        """
        return self.load(name, self._resolve(source, tenant_of(name)), base, source=source, quota=quota)

    def load(
        self,
        name: str,
        folder: Path,
        base: str | None = None,
        *,
        source: str | None = None,
        quota: Quota = UNLIMITED,
    ) -> tuple[ServedAdapter, bool]:
        """Read a folder and serve it as `name`; returns it, and whether the name is new.

        Blocks for the time of reading: call it on a pool thread. Without `base` the base that the
        adapter fits is found. Raises ServiceError naming the tensor or field at fault.
        """
        try:
            self._check_name(name, base)
            fitting, adapter = self._read(folder, base)
            served = ServedAdapter(name, fitting, adapter, source or folder.name)
            created = self._swap_in(served, quota)
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
        log.info("adapter %r removed", name)
        return served

    def load_folder(self, folder: Path) -> dict[str, str]:
        """Load every adapter folder in `folder` under its own name.

        Returns the refused ones with the reason: one tenant's bad file keeps nobody else from being served.
        """
        refused: dict[str, str] = {}
        for config in sorted(folder.glob(f"*/{CONFIG_FILE}")):
            try:
                self.load(config.parent.name, config.parent)
            except ServiceError as error:
                refused[config.parent.name] = error.message
        return refused

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

    def _swap_in(self, served: ServedAdapter, quota: Quota) -> bool:
        with self._lock:
            self._check_quota(served, quota)
            created = served.name not in self._served
            if created and len(self._served) >= self._capacity:
                message = f"{self._capacity} adapters are loaded, which is the limit"
                raise ServiceError(ErrorKind.TOO_MANY_ADAPTERS, message)
            self._served[served.name] = served
        return created

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
        size = served.adapter.nbytes + sum(other.adapter.nbytes for other in others)
        if quota.adapter_bytes is not None and size > quota.adapter_bytes:
            message = f"the adapters of {tenant} would take {size} bytes; its limit is {quota.adapter_bytes}"
            raise ServiceError(ErrorKind.ADAPTER_QUOTA, message)

    def _resolve(self, source: str, tenant: str) -> Path:
        """The folder that a caller means. Neither it nor its files may lie outside the tenant's root."""
        if self._root is None:
            message = "loading over HTTP is off: start the server with --adapters or --adapter-root"
            raise ServiceError(ErrorKind.FORBIDDEN_SOURCE, message)
        root = self._root / tenant
        folder = root / source
        try:
            parts = [path.resolve() for path in (folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE)]
            inside = all(part.is_relative_to(root) for part in parts)
            exists = inside and parts[0].is_dir()
        except (OSError, RuntimeError, ValueError):
            inside, exists = True, False
        if not inside:
            message = "the folder lies outside the server's adapter root"
            raise ServiceError(ErrorKind.FORBIDDEN_SOURCE, message, param="source")
        if not exists:
            message = f"there is no folder {source!r} under the server's adapter root"
            raise ServiceError(ErrorKind.BAD_ADAPTER, message, param="source")
        return parts[0]

    def _read(self, folder: Path, base: str | None) -> tuple[str, Adapter]:
        """The adapter in a folder and the base it fits."""
        candidates = [base] if base is not None else self._candidates(folder)
        fits: dict[str, Adapter] = {}
        problems: dict[str, AdapterError] = {}
        for name in candidates:
            model = self._models[name]
            try:
                fits[name] = read_adapter(folder, model.spec, dtype=model.dtype)
            except AdapterError as error:
                problems[name] = error
        if len(fits) == 1:
            return fits.popitem()
        if len(problems) == 1 and not fits:
            [problem] = problems.values()
            raise ServiceError(ErrorKind.BAD_ADAPTER, str(problem), param=problem.subject)
        if fits:
            message = f"the adapter fits several bases ({', '.join(fits)}): name one as base"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="base")
        reasons = "; ".join(f"{name}: {error}" for name, error in problems.items())
        raise ServiceError(ErrorKind.BAD_ADAPTER, f"the adapter fits no base ({reasons})")

    def _candidates(self, folder: Path) -> list[str]:
        """The base that the adapter's config names, if it is served; otherwise all of them."""
        try:
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            named = Path(str(config["base_model_name_or_path"])).name
        except (OSError, ValueError, TypeError, KeyError):
            named = ""
        return [named] if named in self._models else list(self._models)
