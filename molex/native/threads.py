"""Where the threads of the kernels run."""

from __future__ import annotations

import os

import torch

CPU_SETSIZE = 1024
"""CPUs that the kernels can name: those of the C library's `cpu_set_t`."""


def spread_threads() -> bool:
    """Give each thread that computes for the calling one, itself included, a CPU; returns whether it did.

    They sleep between passes. After a pause passes took up to several times as long, with many switches
    between threads: probably the system wakes one on the CPU of the very thread that waits for it, and the
    two take turns there for a while (`benchmarks/bench_spreading.py`). It takes as many CPUs as threads.
    Where there are more, others may run on those that would be chosen here; and who sets `OMP_PROC_BIND` has
    chosen already.

    From now on threads that the calling one creates share its CPU.
    """
    cpus = sorted(os.sched_getaffinity(0))
    chosen = "OMP_PROC_BIND" in os.environ
    if chosen or len(cpus) != torch.get_num_threads() or cpus[-1] >= CPU_SETSIZE:
        return False
    torch.ops.molex.spread(cpus)
    return True
