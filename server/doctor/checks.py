"""What `molex serve` would do first, done here one by one: each failure is a problem with a name."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from molex.errors import BaseModelError, MolexError
from molex.exported import graph_bytes, is_exported
from molex.model import MolexModel
from server.adapters import AdapterStore
from server.base import load_base
from server.catalogue.database import schema_revisions
from server.doctor.finding import Finding
from server.doctor.machine import GIB, available_memory, machine
from server.doctor.rates import kernels, precision
from server.errors import ServiceError
from server.metrics import Metrics
from server.precision import precision_of
from server.settings import Settings, problems

DEMO_BASES = Path(".models")


def examine(options: Mapping[str, object]) -> Iterator[Finding]:
    """Everything, as it is found out; `options` are those of `molex serve`."""
    settings, wrong = None, []
    try:
        settings = Settings(**options)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = [Finding("settings", "cannot be used", problem=problem) for problem in problems(error)]
    yield from machine()
    yield kernels()
    yield from precision(settings)
    yield _onnx()
    yield _structured()
    yield from wrong
    if settings is None:
        yield _models()
        return
    yield _catalogue(settings)
    yield _storage(settings.storage)
    yield from _listeners(settings)
    yield from _served(settings)


def _onnx() -> Finding:
    if find_spec("onnxruntime") is None:
        return Finding("onnx", "ONNX Runtime is not installed: no backend onnx, and no exported bases")
    return Finding("onnx", f"ONNX Runtime {version('onnxruntime')}, for the backend onnx and exported bases")


def _structured() -> Finding:
    if find_spec("llguidance") is None:
        return Finding(
            "structured", "not installed: requests with a JSON schema, pattern or choice are refused"
        )
    return Finding("structured", "JSON schemas, patterns and choices")


def _models() -> Finding:
    found = sorted(str(config.parent) for config in DEMO_BASES.glob("*/config.json"))
    return Finding("models", f"found {', '.join(found)}" if found else f"none in {DEMO_BASES}")


def _catalogue(settings: Settings) -> Finding:
    if settings.catalogue is None:
        return Finding("catalogue", "none: callers need no keys")
    url = settings.catalogue[0]
    name = url.set(query={}).render_as_string(hide_password=True)
    if url.drivername == "sqlite" and not Path(str(url.database)).exists():
        folder = Path(str(url.database)).resolve().parent
        problem = None if folder.is_dir() else f"the catalogue {name}: there is no folder {folder}"
        return Finding("catalogue", f"{name}, to be made", problem)
    try:
        current, newest = schema_revisions(url)
    except ServiceError as error:
        return Finding("catalogue", name, problem=f"{name}: {error.message}")
    if current == newest:
        return Finding("catalogue", f"{name}, its tables are those of this version")
    return Finding("catalogue", f"{name}, at {current or 'nothing'}; `molex serve` brings it to {newest}")


def _storage(folder: Path | None) -> Finding:
    """Where adapters that come over HTTP are kept; looked at, not made."""
    if folder is None:
        return Finding("storage", "none: adapters that come over HTTP last as long as the server")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    fact = f"{folder}, {free / GIB:.1f} GiB free" + ("" if there == folder.absolute() else ", to be made")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding("storage", fact, problem=f"storage: {there} is no folder that can be written to")
    return Finding("storage", fact)


def _listeners(settings: Settings) -> Iterator[Finding]:
    ports = [(settings.host, settings.port)]
    if settings.admin_port is not None:
        ports.append((settings.admin_host, settings.admin_port))
    for host, port in ports:
        reason = _why_not_to_listen(host, port)
        if reason is None:
            yield Finding("listener", f"{host} port {port or 'of its choice'} is free")
        else:
            yield Finding("listener", f"{host} port {port}: {reason}", f"port {port} on {host}: {reason}")


def _why_not_to_listen(host: str, port: int) -> str | None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with closing(socket.create_server((host, port), family=family)):
            return None
    except OSError as error:
        # The socket module adds the address to it, which is said already.
        return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror)


def _served(settings: Settings) -> Iterator[Finding]:
    logging.disable_progress_bar()
    models: dict[str, MolexModel] = {}
    for name, source in settings.bases.items():
        try:
            begin = time.perf_counter()
            _check_memory(source, settings)
            model = load_base(name, source, settings).model
        except (MolexError, ServiceError) as error:
            yield Finding("base", f"{name}: cannot be served", problem=f"base {name}: {error}")
            continue
        models[name] = model
        took = time.perf_counter() - begin
        layers = f"{model.spec.model_type}, {model.spec.num_layers} layers"
        size = f"{model.nbytes / GIB:.2f} GiB"
        fact = f"{name}: {layers}, {size}, loaded in {took:.1f} s, runs on {model.runs_on}"
        yield Finding("base", fact)
    if settings.adapters is not None and len(models) == len(settings.bases):
        yield _adapters(settings, settings.adapters, models)


def _check_memory(source: str, settings: Settings) -> None:
    """Raises BaseModelError where the weights of a folder are sure not to fit."""
    needed = stored_weights(Path(source)) * precision_of(source, settings).own.itemsize
    if is_exported(source):
        needed += graph_bytes(Path(source))
    if needed > (available := available_memory()):
        raise BaseModelError(
            f"its weights take {needed / GIB:.1f} GiB, and {available / GIB:.1f} GiB of memory are available"
        )


def stored_weights(folder: Path) -> int:
    """How many numbers the safetensors files of a base folder hold; 0 for what is no such folder."""
    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as tensors:
                names = tensors.keys()
                count += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
        except (OSError, SafetensorError):
            return 0  # Loading it says what is wrong.
    return count


def _adapters(settings: Settings, folder: Path, models: Mapping[str, MolexModel]) -> Finding:
    store = AdapterStore(models, settings, Metrics())
    refused = store.load_folder(folder)
    named = "; ".join(f"{name} is refused: {reason}" for name, reason in refused.items())
    return Finding("adapters", f"{len(store.all())} can be served from {folder}" + (named and f"; {named}"))
