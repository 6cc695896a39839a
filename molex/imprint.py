"""Adapters that are read again: files that are still the same need no second look.

What strangers bring goes through `molex.adapter_file`, which accounts for every tensor and value. Of that an
`Imprint` is kept. It tells whether files are still the same, by a code under a key of this process, which
takes a tenth of the time of SHA-256. And it makes their adapter in place: the bytes that were read are its
memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from torch import Tensor

from molex.adapter import Adapter, assemble
from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles, is_up_factor, opened
from molex.backbone import BaseSpec
from molex.errors import AdapterError

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
ALIGNMENT = 64
"""Of the first value in memory, as PyTorch has it: a line of the CPU's caches."""
MOST_HEADER_BYTES = 2**16
"""Of what an adapter keeps in memory beside its values, which nobody counts."""
CODED_TOGETHER = 2**30
"""Bytes that OpenSSL is given at a time: it takes less than 2 GiB."""

_key, _nonce = os.urandom(16), os.urandom(12)


def authentication_code(*parts: bytes | bytearray | memoryview) -> bytes:
    """GMAC (NIST SP 800-38D) of bytes that follow each other, under the key of this process.

    Who knows neither the key nor a code can do no better than guess which n other bytes have the code of
    given ones: a guess is right with a probability of n / 2^132. All codes have one nonce, which is safe
    because none leaves the process.
    """
    encryptor = Cipher(AES(_key), GCM(_nonce)).encryptor()
    for part in parts:
        for start in range(0, len(part), CODED_TOGETHER):
            encryptor.authenticate_additional_data(memoryview(part)[start : start + CODED_TOGETHER])
    encryptor.finalize()
    return encryptor.tag


class Imprint:
    """What is kept of the files of an adapter while its weights are not in memory."""

    def __init__(self, files: AdapterFiles, adapter: Adapter, layout: Layout) -> None:
        self._config, self._digest = adapter.config, adapter.digest
        self._sizes = len(files.config), len(files.weights)
        self._code = authentication_code(files.config, files.weights)
        self._layout = layout

    @classmethod
    def of(cls, files: AdapterFiles, adapter: Adapter) -> Imprint | None:
        """That of the files that an adapter was made of.

        None where an adapter that has the files as its memory would take much more of it than its tensors do:
        they are of several types, or the header is long.
        """
        layout = _layout_of(files.weights)
        return None if layout is None else cls(files, adapter, layout)

    def read(
        self,
        folder: str | Path,
        spec: BaseSpec,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Adapter:
        """The adapter once more, for the same base and precision.

        Raises AdapterError where the files cannot be read or are not the same any more.
        """
        config_size, weights_size = self._sizes
        config, room = bytearray(config_size), self._layout.room(weights_size)
        weights = room.numpy().data[self._layout.lead :]
        _fill(Path(folder), CONFIG_NAME, config)
        _fill(Path(folder), WEIGHTS_NAME, weights)
        if authentication_code(config, weights) != self._code:
            raise _changed()
        tensors = self._layout.tensors(room, torch.promote_types(dtype, torch.float32), device)
        return assemble(self._config, spec, tensors, digest=self._digest)


def _fill(folder: Path, name: str, buffer: bytearray | memoryview) -> None:
    """Read a file of just that size."""
    with opened(folder, name) as (file, size):
        if size != len(buffer) or file.readinto(buffer) != size:
            raise _changed()


def _changed() -> AdapterError:
    return AdapterError("digest", "the files have changed since they were loaded")


class Place(NamedTuple):
    """Where a tensor lies: behind `start` values."""

    name: str
    shape: Sequence[int]
    strides: Sequence[int]
    start: int


class Layout:
    """Where the tensors lie in files that begin with the same header, all of them in one precision."""

    def __init__(self, header: Mapping[str, Any], dtype: torch.dtype, first: int) -> None:
        """`first`: where the values begin in a file."""
        self.lead = -first % ALIGNMENT
        """Bytes to leave free in front of a file, so that its values are aligned."""
        self._dtype = dtype
        self._places = [
            _place(name, fields["shape"], (self.lead + first + fields["data_offsets"][0]) // dtype.itemsize)
            for name, fields in header.items()
        ]
        self._up_factors = [place for place in self._places if is_up_factor(place.name)]

    def room(self, size: int) -> Tensor:
        """Bytes for the lead and a file."""
        return torch.empty(self.lead + size, dtype=torch.uint8)

    def tensors(self, room: Tensor, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """Those of the file in a room, whose bytes are theirs from now on."""
        bits: Any = room.numpy().view(f"u{self._dtype.itemsize}")
        for place in self._up_factors:
            _transpose(bits[place.start :], *place.shape)
        values = room.view(self._dtype).to(device, dtype)
        return {
            name: values.as_strided(shape, strides, start) for name, shape, strides, start in self._places
        }


def _place(name: str, shape: Sequence[int], start: int) -> Place:
    if is_up_factor(name):
        return Place(name, shape, (1, shape[0]), start)
    return Place(name, shape, [prod(shape[axis + 1 :]) for axis in range(len(shape))], start)


def _transpose(values: Any, rows: int, columns: int) -> None:
    """Lay the matrix that some values begin with out column by column, where it is."""
    matrix = values[: rows * columns]
    matrix[:] = matrix.reshape(rows, columns).T.flatten()


_layouts: WeakValueDictionary[bytes, Layout] = WeakValueDictionary()
"""By the hash of the header: adapters of one recipe share it."""


def _layout_of(weights: bytes) -> Layout | None:
    (length,) = struct.unpack("<Q", weights[:8])
    if length > MOST_HEADER_BYTES:
        return None
    text = weights[8 : 8 + length]
    key = sha256(text).digest()
    if (layout := _layouts.get(key)) is None:
        header = {name: fields for name, fields in json.loads(text).items() if name != "__metadata__"}
        stored = {fields["dtype"] for fields in header.values()}
        if len(stored) != 1:
            return None
        layout = _layouts.setdefault(key, Layout(header, DTYPES[stored.pop()], 8 + length))
    return layout
