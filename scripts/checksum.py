"""Identifies the tensors of a safetensors file, without torch."""

import hashlib
import json
from pathlib import Path


def tensor_digest(weights: Path) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes, in the order of the names.

    Unlike the digest of the file, it does not depend on metadata or on the order of the tensors.
    """
    data = weights.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + header_bytes :]
    digest = hashlib.sha256()
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        digest.update(body[begin:end])
    return digest.hexdigest()
