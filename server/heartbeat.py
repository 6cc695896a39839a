"""Whether the worker thread goes on, as the event loop sees it."""

from __future__ import annotations

LOOK_SECONDS = 0.5
LOST_SECONDS = 30


class Heartbeat:
    """Compares a number that grows while the worker works: once every `LOOK_SECONDS`.

    Looks are counted, not seconds. While this process is stopped or its event loop is late nobody looks, and
    so nobody is taken to be stuck for it.
    """

    def __init__(self, patience: float) -> None:
        """`patience`: the seconds for which the number may stand still."""
        self._patience = patience
        self._last = -1
        self._still = 0.0

    def look(self, progress: int) -> None:
        self._still = self._still + LOOK_SECONDS if progress == self._last else 0.0
        self._last = progress

    @property
    def stuck(self) -> bool:
        """Whether the worker has not gone on for too long. It may yet."""
        return self._still >= self._patience

    @property
    def lost(self) -> bool:
        """Whether it has been stuck for so long that only a new process will help."""
        return self._still >= self._patience + LOST_SECONDS
