"""Adapter folders: which of them may be read, and the base that an adapter fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from molex.adapter import Adapter
from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles, parse_adapter, read_files
from molex.errors import AdapterError
from molex.model import MolexModel
from server.errors import ErrorKind, ServiceError


class Sources:
    """Reads adapters for the bases `models`; HTTP callers may name folders under `root`, if there is one.

    Those of a tenant have a root of their own, the folder in `root` that bears its name.
    """

    def __init__(self, models: Mapping[str, MolexModel], root: Path | None) -> None:
        self._models = models
        self._root = None if root is None else root.resolve()

    def resolve(self, source: str, tenant: str = "") -> Path:
        """The folder that a caller means. Neither it nor its files may lie outside the root of its tenant.

        Raises ServiceError.
        """
        if self._root is None:
            message = "loading over HTTP is off: start the server with --adapters or --adapter-root"
            raise ServiceError(ErrorKind.FORBIDDEN_SOURCE, message)
        root = self._root / tenant
        folder = root / source
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

    def read(self, folder: Path, base: str | None) -> tuple[str, Adapter]:
        """The adapter in a folder and the base that it fits; `base` is the only one to try, if it is given.

        Raises ServiceError naming the tensor, field or file at fault.
        """
        try:
            files = read_files(folder)
        except AdapterError as error:
            raise ServiceError(ErrorKind.BAD_ADAPTER, str(error), param=error.subject) from error
        fits: dict[str, Adapter] = {}
        problems: dict[str, AdapterError] = {}
        for name in [base] if base is not None else self._candidates(files):
            model = self._models[name]
            try:
                fits[name] = parse_adapter(files, model.spec, model.dtype, model.device)
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

    def read_again(self, folder: Path, base: str, digest: str) -> Adapter:
        """The adapter that `read` found in a folder before; its values are not checked again.

        Raises AdapterError where the files cannot be read or have another digest by now.
        """
        model = self._models[base]
        files = read_files(folder)
        if files.digest != digest:
            raise AdapterError("digest", "the files have changed since they were loaded")
        return parse_adapter(files, model.spec, model.dtype, model.device, validated=True)

    def _candidates(self, files: AdapterFiles) -> list[str]:
        """The base that the adapter's config names, if it is served; otherwise all of them."""
        try:
            config = json.loads(files.config)
            named = Path(str(config["base_model_name_or_path"])).name
        except (ValueError, TypeError, KeyError, RecursionError):
            named = ""
        return [named] if named in self._models else list(self._models)
