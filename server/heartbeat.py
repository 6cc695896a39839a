"""Whether the worker thread goes on, as the event loop sees it."""

from __future__ import annotations

import time
from threading import get_ident

LOOK_SECONDS = 0.5
LOST_SECONDS = 30
BUSY_SECONDS = 0.01
"""CPU time between two looks from which on a thread counts as computing."""
BUSY_PATIENCE = 15
"""Whoever computes has so many times the patience: a layer is long on a crowded CPU."""


class Heartbeat:
    """Compares a number that grows while the worker works, and its CPU time, once every `LOOK_SECONDS`.

    Looks are counted, not seconds. While this process is stopped or its event loop is late nobody looks, and
    so nobody is taken to be stuck for it.
    """

    def __init__(self, patience: float) -> None:
        """`patience`: the seconds for which the number may stand still while nothing is computed."""
        self._patience = patience
        self._last = (-1, 0.0)
        self._still = 0.0

    def look(self, progress: int, cpu_seconds: float) -> None:
        last_progress, last_cpu = self._last
        self._last = (progress, cpu_seconds)
        if progress != last_progress:
            self._still = 0.0
        elif cpu_seconds - last_cpu < BUSY_SECONDS:
            self._still += LOOK_SECONDS
        else:
            self._still += LOOK_SECONDS / BUSY_PATIENCE

    @property
    def stuck(self) -> bool:
        """Whether the worker has not gone on for too long. It may yet."""
        return self._still >= self._patience

    @property
    def lost(self) -> bool:
        """Whether it has been stuck for so long that only a new process will help."""
        return self._still >= self._patience + LOST_SECONDS


def cpu_clock() -> int:
    """The clock of the CPU time of the thread that calls this."""
    return time.pthread_getcpuclockid(get_ident())


def cpu_seconds(clock: int | None) -> float:
    """What such a clock says; 0 where its thread has ended, or has not begun."""
    try:
        return 0.0 if clock is None else time.clock_gettime(clock)
    except OSError:
        return 0.0
