"""What any process changes in a catalogue, soon after it has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from server.catalogue.catalogue import Catalogue
from server.errors import ServiceError

REFRESH_SECONDS = 1.0
"""How long a change by another process may go unseen here."""
REFRESH_ENTRIES = 1000

log = logging.getLogger(__name__)


class Changes:
    """Reads the audit log, which has an entry for each change of whichever process.

    `listeners` are called with the subject of each entry: `key:ID`, `tenant:NAME` or `adapter:NAME`.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.listeners: list[Callable[[str], None]] = []
        self._catalogue = catalogue
        self._seen = 0

    async def start(self) -> None:
        """Pass over what has been until now: whoever listens has read nothing yet."""
        self._seen = await self._catalogue.last_entry()

    async def refresh(self) -> None:
        """Tell of what has changed since the last time."""
        while entries := await self._catalogue.entries(self._seen, REFRESH_ENTRIES):
            for entry in entries:
                for listener in self.listeners:
                    listener(entry.subject)
            self._seen = entries[-1].number

    async def watch(self) -> None:
        """Refresh until cancelled, whatever fails. While the database is down, what was known stays good."""
        reachable = True
        while True:
            try:
                await self.refresh()
                reachable = True
            except ServiceError:
                if reachable:
                    log.exception("the catalogue cannot be reached; what is in memory stays good")
                reachable = False
            except Exception:
                log.exception("a change of the catalogue could not be followed")
            await asyncio.sleep(REFRESH_SECONDS)
