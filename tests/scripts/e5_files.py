"""Writes tiny E5 files: two layers, four pieces beside the special ones."""

import struct

import numpy as np
import numpy.typing as npt

HIDDEN, LAYERS, HEADS, FEED_FORWARD, POSITIONS, TYPES = 32, 2, 4, 64, 8, 2
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁good", "▁film", "s"]
SCORES = [0.0, 0.0, 0.0, 0.0, -4.0, -2.0, -2.5, -3.0]
FLOAT32, FOUR_BIT = 0, 1
MATRICES = {
    "q": (32, 32),
    "k": (32, 32),
    "v": (32, 32),
    "ao": (32, 32),
    "fi": (64, 32),
    "fo": (32, 64),
}


def quantise(values: npt.NDArray[np.float32]) -> bytes:
    """4-bit blocks of 32 values, scaled so that the largest magnitude becomes seven steps."""
    blocks = values.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1) / 7).astype("<f2")
    safe = np.where(scales == 0, 1, scales).astype(np.float32)
    quants = (np.rint(blocks / safe[:, None]) + 8).clip(0, 15).astype(np.uint8)
    nibbles = quants[:, :16] | quants[:, 16:] << 4
    return b"".join(s.tobytes() + n.tobytes() for s, n in zip(scales, nibbles, strict=True))


def tiny_tensors(seed: int = 0) -> dict[str, tuple[int, npt.NDArray[np.float32]]]:
    """Every tensor of the model as (kind, values), in the file's names."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> npt.NDArray[np.float32]:
        return random.normal(size=shape).astype(np.float32)

    tensors = {
        "emb.word": (FOUR_BIT, values(len(PIECES), HIDDEN)),
        "emb.pos": (FLOAT32, values(POSITIONS, HIDDEN)),
        "emb.type": (FLOAT32, values(TYPES, HIDDEN)),
        "emb.ln.w": (FLOAT32, values(HIDDEN)),
        "emb.ln.b": (FLOAT32, values(HIDDEN)),
    }
    for layer in range(LAYERS):
        for module, (rows, columns) in MATRICES.items():
            tensors[f"l{layer}.{module}.w"] = (FOUR_BIT, values(rows, columns))
            tensors[f"l{layer}.{module}.b"] = (FLOAT32, values(rows))
        for norm in ("aln", "oln"):
            tensors[f"l{layer}.{norm}.w"] = (FLOAT32, values(HIDDEN))
            tensors[f"l{layer}.{norm}.b"] = (FLOAT32, values(HIDDEN))
    return tensors


def e5_bytes(tensors: dict[str, tuple[int, npt.NDArray[np.float32]]], block: int = 32) -> bytes:
    """A whole file with the sizes above and the given tensors."""
    sizes = (HIDDEN, LAYERS, HEADS, FEED_FORWARD, len(PIECES), POSITIONS, TYPES)
    head = b"E5S1" + struct.pack("<8ifi", 1, *sizes, 1e-12, block)
    head += struct.pack("<5i", len(PIECES), 0, 2, 1, 3) + _piece_table() + struct.pack("<iI", 0, 0)
    stored = {
        name: quantise(values) if kind == FOUR_BIT else values.tobytes()
        for name, (kind, values) in tensors.items()
    }
    head += struct.pack("<i", len(tensors))
    offset = len(head) + sum(2 + len(name.encode()) + 21 for name in tensors)
    for name, (kind, values) in tensors.items():
        encoded = name.encode()
        entry = (kind, values.size, offset, len(stored[name]))
        head += struct.pack("<H", len(encoded)) + encoded + struct.pack("<BIQQ", *entry)
        offset += len(stored[name])
    return head + b"".join(stored.values())


def _piece_table() -> bytes:
    text = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0] + [len(piece) for piece in text]).astype("<u4")
    blob = b"".join(text)
    scores = np.array(SCORES, "<f4")
    return struct.pack("<Q", len(blob)) + offsets.tobytes() + scores.tobytes() + blob
