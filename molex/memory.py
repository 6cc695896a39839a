"""How the process keeps memory between forward passes."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3) in glibc.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_BLOCK = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed; returns whether the C library can be told so.

    Every pass allocates and frees the same tens of megabytes. By default large blocks go back to the
    operating system each time, which hands them out again page by page and zeroed: a fifth of the time of a
    pass over some thousand tokens. The process then keeps the memory of its largest pass. For programs that
    serve, not for libraries: it concerns the whole process.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    kept = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(kept)
