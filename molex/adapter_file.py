"""Adapter folders: `adapter_config.json` beside `adapter_model.safetensors`, as PEFT lays them out.

Every tensor is accounted for. One that is unknown, missing, misshapen, not finite or without effect is an
error that names it: an adapter that would silently do nothing is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from molex.adapter import MIX, MIX_LOGITS, PEFT_PREFIX, Adapter, assemble, tensor_shapes
from molex.backbone import BaseSpec
from molex.config import AdapterConfig
from molex.config_file import config_fields, parse_config
from molex.errors import AdapterError
from molex.heads import POOLER, Shape, output_name
from molex.strict_json import parse_object

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_WEIGHTS_BYTES = 2**30
MAX_HEADER_BYTES = 2**24
"""Of the JSON that a safetensors file begins with: room for 100,000 tensors."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AdapterFiles:
    """What the two files of an adapter folder held when they were read."""

    config: bytes
    weights: bytes

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of both."""
        digest = hashlib.sha256()
        for content in (self.config, self.weights):
            digest.update(hashlib.sha256(content).digest())
        return f"sha256:{digest.hexdigest()}"


def read_files(folder: str | Path) -> AdapterFiles:
    """Read a folder. Raises AdapterError, which names the file that is too large or cannot be read."""
    config = _read(Path(folder), CONFIG_NAME, MAX_CONFIG_BYTES)
    return AdapterFiles(config, _read(Path(folder), WEIGHTS_NAME, MAX_WEIGHTS_BYTES))


def read_adapter(
    folder: str | Path,
    spec: BaseSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Adapter:
    """Read and validate an adapter folder for a base model; see `parse_adapter`."""
    return parse_adapter(read_files(folder), spec, dtype, device)


def parse_adapter(
    files: AdapterFiles,
    spec: BaseSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Adapter:
    """Make an adapter for a base model of the files of a folder; touches no model.

    The adapter is kept in `dtype`, the base model's, but in no less than float32. Raises AdapterError, which
    names the tensor, field or file at fault.
    """
    config = parse_config(files.config, spec.num_layers)
    try:
        tensors = load(files.weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(WEIGHTS_NAME, f"not a safetensors file ({error})") from error
    kept = torch.promote_types(dtype, torch.float32)
    _check_names_and_shapes(config, spec, tensors)
    _check_dtypes(tensors)
    converted = {name: tensor.to(kept) for name, tensor in tensors.items()}
    _check_values(converted)
    moved = {name: _laid_out(name, tensor.to(device)) for name, tensor in converted.items()}
    return assemble(config, spec, moved, digest=files.digest)


def is_up_factor(name: str) -> bool:
    """Whether a tensor is B [out, r] of a low-rank update.

    Adapters have it column by column, in which order the kernels read it without a copy.
    """
    return name.endswith(".lora_B.weight")


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T if is_up_factor(name) else tensor


@contextmanager
def opened(folder: Path, name: str) -> Iterator[tuple[FileIO, int]]:
    """A file of an adapter folder, to be read, and its size. Raises AdapterError where it cannot be read."""
    try:
        # Without O_NONBLOCK a pipe in the place of a file would be waited for, without end.
        with FileIO(os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(name, "is not a file")
            yield file, status.st_size
    except OSError as error:
        hint = ""
        if name == WEIGHTS_NAME and (folder / "adapter_model.bin").exists():
            hint = "; adapter_model.bin is a pickle, which is never read"
        raise AdapterError(name, f"cannot be read ({error.strerror}){hint}") from error


def _read(folder: Path, name: str, most: int) -> bytes:
    with opened(folder, name) as (file, size):
        if size > most:
            raise AdapterError(name, f"has {size} bytes; no more than {most} are read")
        if name == WEIGHTS_NAME:
            _check_size(file, size)
        return file.read(size)


def _check_size(file: FileIO, size: int) -> None:
    """Refuse weights whose header says that they are of another size: a hole of gigabytes is not read."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER_BYTES, size):
            raise ValueError(f"a header of {length} bytes")
        header = parse_object(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if (described := 8 + length + max(ends, default=0)) != size:
            raise ValueError(f"{size} bytes, of which the header describes {described}")
    except (struct.error, ValueError, KeyError, IndexError, TypeError) as error:
        raise AdapterError(WEIGHTS_NAME, f"not a safetensors file ({error})") from error
    file.seek(0)


def _check_names_and_shapes(config: AdapterConfig, spec: BaseSpec, tensors: Mapping[str, Tensor]) -> None:
    expected = _expected_shapes(config, spec, tensors)
    for name in tensors:
        if name not in expected:
            raise AdapterError(name, f"unknown tensor for a {config.kind} adapter on {spec.model_type}")
    for name, shape in expected.items():
        if name not in tensors:
            raise AdapterError(name, f"missing in {WEIGHTS_NAME}")
        if tuple(tensors[name].shape) != shape:
            raise AdapterError(name, f"has shape {list(tensors[name].shape)}, expected {list(shape)}")


def _expected_shapes(
    config: AdapterConfig, spec: BaseSpec, tensors: Mapping[str, Tensor]
) -> dict[str, Shape]:
    if config.task_type == "CAUSAL_LM":
        if not spec.generates:
            raise AdapterError("task_type", f"CAUSAL_LM needs a decoder, but the base is {spec.model_type}")
        return tensor_shapes(config, spec, 0, pooler=False)
    output = PEFT_PREFIX + output_name(spec.head)
    if output not in tensors:
        raise AdapterError(output, f"missing in {WEIGHTS_NAME}")
    pooler = f"{PEFT_PREFIX}{POOLER}.weight" in tensors
    if spec.head == "bert" and not pooler and not spec.has_pooler:
        raise AdapterError(f"{PEFT_PREFIX}{POOLER}.weight", "missing, and the base model has no pooler")
    num_labels = tensors[output].shape[0] if tensors[output].ndim else 0
    if not num_labels:
        raise AdapterError(output, "has no labels")
    if config.regression and num_labels != 1:
        raise AdapterError("problem_type", f"regression has one output, but the head has {num_labels}")
    if config.id2label is not None and len(config.id2label) != num_labels:
        raise AdapterError("id2label", f"{len(config.id2label)} names for {num_labels} labels")
    return tensor_shapes(config, spec, num_labels, pooler=pooler)


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            given = str(tensor.dtype).removeprefix("torch.")
            raise AdapterError(name, f"has dtype {given}, expected floating point of 16, 32 or 64 bits")


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Nothing that the precision cannot hold, and nothing without effect.

    In numpy: it takes a fifth of PyTorch's time for tensors this small, and no helper threads for large ones.
    """
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise AdapterError(name, "has values that are not finite")
    for name, array in arrays.items():
        if name.endswith((".lora_A.weight", ".lora_B.weight")) and not array.any():
            raise AdapterError(name, "has no effect: every value is 0")
    if MIX in arrays and not arrays[MIX][:, 1].any():
        raise AdapterError(MIX, "has no effect: every w_routed is 0")


def write_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write the two files of an adapter, replacing those that are there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter.tensors.items()}
    if MIX_LOGITS in tensors:
        del tensors[MIX_LOGITS]
        tensors[MIX] = adapter.mixing_pairs().detach().cpu().contiguous()
    fields = config_fields(adapter.config, _head_modules(adapter))
    _replace(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    _replace(folder / CONFIG_NAME, (json.dumps(fields, indent=2) + "\n").encode())


def _head_modules(adapter: Adapter) -> list[str]:
    """What PEFT calls the modules that it saves whole."""
    if adapter.head is None:
        return []
    return sorted({name.removeprefix("bert.").split(".")[0] for name in adapter.head.tensors})


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
