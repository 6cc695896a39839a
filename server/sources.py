"""Adapter folders: which of them may be read, and the base that an adapter fits."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from molex.adapter import Adapter
from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles, parse_adapter, read_files
from molex.errors import AdapterError
from molex.imprint import Imprint
from molex.model import MolexModel
from server.errors import ErrorKind, ServiceError


class Fitted(NamedTuple):
    """The adapter in some files, the base that it fits, and what tells the files when they are read again."""

    base: str
    adapter: Adapter
    imprint: Imprint | None


class Sources:
    """Reads adapters for the bases `models`; HTTP callers may name folders under `root`, if there is one.

    Those of a tenant have a root of their own, the folder in `root` that bears its name.
    """

    def __init__(self, models: Mapping[str, MolexModel], root: Path | None) -> None:
        self._models = models
        self._root = None if root is None else root.resolve()

    def resolve(self, source: str, tenant: str = "") -> Path:
        """The folder that a caller means, by its path or as `file://…`.

        Neither it nor its files may lie outside the root of its tenant. Raises ServiceError.
        """
        if self._root is None:
            message = "loading over HTTP is off: start the server with --adapters or --adapter-root"
            raise ServiceError(ErrorKind.FORBIDDEN_SOURCE, message)
        root = self._root / tenant
        folder = root / _path(source)
        try:
            parts = [path.resolve() for path in (folder, folder / CONFIG_NAME, folder / WEIGHTS_NAME)]
            inside = all(part.is_relative_to(root) for part in parts) and root.is_relative_to(self._root)
            exists = inside and parts[0].is_dir()
        except (OSError, RuntimeError, ValueError):
            inside, exists = True, False
        if not inside:
            message = "the folder lies outside the server's adapter root"
            raise ServiceError(ErrorKind.FORBIDDEN_SOURCE, message, param="source")
        if not exists:
            message = f"there is no folder {source!r} under the server's adapter root"
            raise ServiceError(ErrorKind.NO_SOURCE, message, param="source")
        return parts[0]

    def read(self, folder: Path, base: str | None) -> Fitted:
        """The adapter in a folder and the base that it fits; `base` is the only one to try, if it is given.

        Raises ServiceError naming the tensor, field or file at fault.
        """
        try:
            files = read_files(folder)
        except AdapterError as error:
            raise ServiceError(ErrorKind.BAD_ADAPTER, str(error), param=error.subject) from error
        return self.fit(files, base)

    def copy(self, folder: Path, max_bytes: int) -> AdapterFiles:
        """The files of a folder that a caller named. Raises ServiceError naming the file at fault.

        They are opened without following links, whatever has become of the folder, or of one that it lies in,
        since `resolve`.
        """
        assert self._root is not None
        descriptor = _open_folder(self._root, folder.relative_to(self._root))
        try:
            names = (CONFIG_NAME, WEIGHTS_NAME)
            return AdapterFiles(*(_read_regular(descriptor, name, max_bytes) for name in names))
        finally:
            os.close(descriptor)

    def fit(self, files: AdapterFiles, base: str | None) -> Fitted:
        """The adapter in some files and the base that it fits, as in `read`."""
        fits: dict[str, Adapter] = {}
        problems: dict[str, AdapterError] = {}
        for name in [base] if base is not None else self._candidates(files):
            model = self._models[name]
            try:
                fits[name] = parse_adapter(files, model.spec, model.dtype, model.device)
            except AdapterError as error:
                problems[name] = error
        if len(fits) == 1:
            [(name, adapter)] = fits.items()
            return Fitted(name, adapter, Imprint.of(files, adapter))
        if len(problems) == 1 and not fits:
            [problem] = problems.values()
            raise ServiceError(ErrorKind.BAD_ADAPTER, str(problem), param=problem.subject)
        if fits:
            message = f"the adapter fits several bases ({', '.join(fits)}): name one as base"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="base")
        reasons = "; ".join(f"{name}: {error}" for name, error in problems.items())
        raise ServiceError(ErrorKind.BAD_ADAPTER, f"the adapter fits no base ({reasons})")

    def read_again(self, folder: Path, base: str, digest: str, imprint: Imprint | None) -> Fitted:
        """The adapter in a folder that is known already, by its imprint if there is one.

        Raises AdapterError where the files cannot be read or have another digest by now.
        """
        model = self._models[base]
        if imprint is not None:
            return Fitted(base, imprint.read(folder, model.spec, model.dtype, model.device), imprint)
        files = read_files(folder)
        if files.digest != digest:
            raise AdapterError("digest", "the files have changed since they were loaded")
        adapter = parse_adapter(files, model.spec, model.dtype, model.device)
        return Fitted(base, adapter, Imprint.of(files, adapter))

    def _candidates(self, files: AdapterFiles) -> list[str]:
        """The base that the adapter's config names, if it is served; otherwise all of them."""
        try:
            config = json.loads(files.config)
            named = Path(str(config["base_model_name_or_path"])).name
        except (ValueError, TypeError, KeyError, RecursionError):
            named = ""
        return [named] if named in self._models else list(self._models)


def _path(source: str) -> str:
    return unquote(urlsplit(source).path) if source.startswith("file://") else source


def _open(name: str, path: str | Path, flags: int, folder: int | None = None) -> int:
    """Open for reading what is no link. Raises ServiceError, which says `name`."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=folder)
    except OSError as error:
        why = "is a link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise ServiceError(ErrorKind.BAD_ADAPTER, f"{name}: {why}", param=name) from error


def _open_folder(root: Path, path: Path) -> int:
    """Open a folder below a root, step by step: none of them may be a link."""
    descriptor = _open(root.name, root, os.O_DIRECTORY)
    for step in path.parts:
        try:
            descriptor, above = _open(path.name, step, os.O_DIRECTORY, descriptor), descriptor
        except ServiceError:
            os.close(descriptor)
            raise
        os.close(above)
    return descriptor


def _read_regular(folder: int, name: str, max_bytes: int) -> bytes:
    """A file of an open folder: no link, no pipe, and of bounded size."""
    # A pipe would otherwise be waited for.
    descriptor = _open(name, name, os.O_NONBLOCK, folder)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ServiceError(ErrorKind.BAD_ADAPTER, f"{name}: is no regular file", param=name)
        if found.st_size > max_bytes:
            message = f"{name}: has {found.st_size} bytes; max_adapter_bytes is {max_bytes}"
            raise ServiceError(ErrorKind.TOO_LARGE, message, param=name)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)
    finally:
        os.close(descriptor)
