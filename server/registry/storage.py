"""Files of adapters on the local disk, by their digest: private copies that no source can change."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles
from server.errors import ErrorKind, ServiceError

UNFINISHED = ".unfinished-"
"""What the names of folders begin with that are being written or removed."""
LOCK = ".lock"


class Storage:
    """A folder with a folder for each digest, within a budget of bytes. From any thread.

    A copy is written under another name, synced, and renamed: it is there whole or not at all, also after
    `kill -9` or a loss of power. What can be fetched again is evicted for others, least recently used first.
    """

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        """Without a folder, one that lasts as long as the process is made."""
        self.lasting = folder is not None
        self.folder = folder if folder is not None else Path()
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}
        self._lock = Lock()
        self._lock_file: int | None = None
        self.evictable: Callable[[], Collection[str]] = tuple

    def open(self) -> None:
        """Make the folder, private, and take stock. Raises ServiceError where another server uses it."""
        try:
            if self.lasting:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.folder.chmod(0o700)
            else:
                self.folder = Path(mkdtemp(prefix="molex-"))
            self._take_lock()
            for path in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(path)
            for path in self.folder.glob("sha256-*"):
                self._sizes[path.name.replace("-", ":", 1)] = _size(path)
        except OSError as error:
            message = f"the storage folder cannot be used: {error.strerror}"
            raise ServiceError(ErrorKind.STORAGE_FULL, message) from error

    def close(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None
        if not self.lasting:
            shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, digest: str) -> Path:
        """The folder of a digest, which is there or not."""
        return self.folder / digest.replace(":", "-", 1)

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def digests(self) -> set[str]:
        """Of all that is there. Waits for no write."""
        return set(self._sizes)

    def put(self, files: AdapterFiles) -> None:
        """Keep a copy. Raises ServiceError where there is no room for it."""
        size = len(files.config) + len(files.weights)
        with self._lock:
            if files.digest in self._sizes:
                return
            self._make_room(size)
            try:
                self._write(files)
            except OSError as error:
                message = f"the adapter cannot be stored: {error.strerror}"
                raise ServiceError(ErrorKind.STORAGE_FULL, message) from error
            self._sizes[files.digest] = size

    def touch(self, digest: str) -> None:
        """Count it as used now."""
        now = time.time()
        with suppress(FileNotFoundError):
            os.utime(self.path(digest), (now, now))

    def remove_unless(self, needed: Callable[[], Collection[str]], digest: str) -> None:
        """Remove a copy, unless it is `needed` by then: no `put` comes between that look and the removal."""
        with self._lock:
            if digest in self._sizes and digest not in needed():
                self._remove(digest)

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove what nothing names: an upload whose server was killed before it had a name for it."""
        with self._lock:
            for digest in self._sizes.keys() - set(digests):
                self._remove(digest)

    def _take_lock(self) -> None:
        self._lock_file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another server uses the storage folder {self.folder}: give each its own"
            raise ServiceError(ErrorKind.STORAGE_FULL, message) from None

    def _make_room(self, size: int) -> None:
        excess = sum(self._sizes.values()) + size - self._max_bytes
        if excess <= 0:
            return
        evictable = [digest for digest in self.evictable() if digest in self._sizes]
        evictable.sort(key=lambda digest: self.path(digest).stat().st_mtime)
        if sum(self._sizes[digest] for digest in evictable) < excess:
            message = f"no room for {size} bytes in the storage: max_storage_bytes is {self._max_bytes}"
            raise ServiceError(ErrorKind.STORAGE_FULL, message)
        for digest in evictable:
            if excess <= 0:
                return
            excess -= self._sizes[digest]
            self._remove(digest)

    def _write(self, files: AdapterFiles) -> None:
        unfinished = Path(mkdtemp(prefix=UNFINISHED, dir=self.folder))
        try:
            for name, content in ((CONFIG_NAME, files.config), (WEIGHTS_NAME, files.weights)):
                _write_synced(unfinished / name, content)
            _sync(unfinished)
            unfinished.rename(self.path(files.digest))
            _sync(self.folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _remove(self, digest: str) -> None:
        """Renamed first, so that half a folder never has the name of a whole one."""
        unfinished = self.folder / f"{UNFINISHED}{self.path(digest).name}"
        self.path(digest).rename(unfinished)
        del self._sizes[digest]
        shutil.rmtree(unfinished)


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME))


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        path.chmod(0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
