"""What the process keeps between forward passes."""

from __future__ import annotations

import ctypes
import gc
import os

# Parameters of mallopt(3) in glibc.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_BLOCK = 1 << 30

# A layer has four shapes of weights, `padded_rows` some 150 numbers of rows, and a process several bases.
COMPILED_KERNELS = 4096


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


def keep_compiled_kernels() -> None:
    """Let oneDNN keep every kernel that it compiles; to be called before the first product.

    It compiles one for each shape and number of rows (`molex/prepack.py`) and keeps 1,024 unless told
    otherwise. Where two precisions or bases need more, it compiles some again in every pass, a few
    milliseconds each. A setting of the environment is left as it is.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED_KERNELS))


def freeze_what_is_loaded() -> None:
    """Keep what there is by now out of garbage collections; for programs that serve, once they have started.

    A full collection looks at every object: half a million once PyTorch and transformers are imported, which
    stops all threads for a quarter of a second. None of them is garbage for as long as the process lives but
    what is let go of, and that is freed when its last reference goes, as ever.
    """
    gc.collect()
    gc.freeze()
