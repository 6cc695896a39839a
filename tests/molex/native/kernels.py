"""What tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from molex.native import build

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(
    build.why_not(torch.bfloat16, CPU) is not None, reason="the kernels need a CPU with AVX2"
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """With so many threads a pass deals blocks of rows out, or works on each together."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
