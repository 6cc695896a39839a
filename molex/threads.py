"""Threads that help other threads to compute."""

from __future__ import annotations

import ctypes
from functools import cache

OMP_PAUSE_SOFT = 1


def release_helpers() -> bool:
    """Let the OpenMP helpers of the calling thread go; returns whether the library could be told.

    GNU's OpenMP keeps a team of helpers for each thread that has computed something. As soon as all teams
    together have more threads than there are CPUs, none of them waits for the next product any more: they
    sleep and have to be woken, which made passes over single requests 2.2 times as slow. A thread that has
    computed and will not do so again soon therefore lets its helpers go; they come back when it needs them.
    """
    library = _openmp()
    return library is not None and bool(library.omp_pause_resource_all(OMP_PAUSE_SOFT) == 0)


@cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's library, where it is there and recent enough."""
    try:
        library = ctypes.CDLL("libgomp.so.1")
    except OSError:
        return None
    return library if hasattr(library, "omp_pause_resource_all") else None
