"""Everything that decides whether a request may go on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.auth.authenticator import Authenticator
from server.auth.caller import ANYONE, Caller
from server.auth.quotas import Quotas
from server.catalogue.catalogue import Catalogue
from server.catalogue.changes import Changes
from server.catalogue.records import Scope
from server.errors import ErrorKind, ServiceError
from server.settings import Settings

PRIVATE = frozenset({Scope.ADMIN, Scope.ADAPTERS_WRITE, Scope.METRICS})
"""What the second listener has to itself, where there is one."""

log = logging.getLogger(__name__)


class Access:
    """Keys, quotas, the second listener and the audit log of one server."""

    def __init__(self, catalogue: Catalogue | None = None) -> None:
        self.quotas = Quotas()
        self.admin_port: int | None = None
        """Where the second listener listens, once it does."""
        self.shared_catalogue = catalogue
        self.changes = None if catalogue is None else Changes(catalogue)
        """Of the shared catalogue, by any process."""
        self._authenticator = None if catalogue is None else Authenticator(catalogue)
        if self.changes is not None:
            self.changes.listeners.append(self.changed)

    @classmethod
    def load(cls, settings: Settings) -> Access:
        """With the catalogue that the settings name."""
        return cls(Catalogue(*settings.catalogue) if settings.catalogue else None)

    @property
    def catalogue(self) -> Catalogue:
        """Raises ServiceError (404) where there is none."""
        if self.shared_catalogue is None:
            message = "this server has no catalogue of tenants: start it with --database"
            raise ServiceError(ErrorKind.NOT_FOUND, message)
        return self.shared_catalogue

    async def start(self) -> None:
        """Raises ServiceError (503) where the catalogue cannot be reached."""
        if self.changes is not None:
            await self.changes.start()
            now = time.time()
            if not any(key.state(now) == "live" for key in await self.catalogue.keys()):
                log.warning("no API key is live: every request is refused until `molex key create` makes one")

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Hear of changes meanwhile. All who listen are to know by now what there was at the start."""
        if self.changes is None:
            yield
            return
        watch = asyncio.create_task(self.changes.watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def stop(self) -> None:
        if self.shared_catalogue is not None:
            await self.shared_catalogue.close()

    async def identify(self, authorization: str | None) -> Caller:
        """Who sent a request with this header; anyone where no keys are needed. Raises ServiceError."""
        if self._authenticator is None:
            return ANYONE
        return await self._authenticator.identify(authorization)

    def answers(self, scope: Scope, port: int) -> bool:
        """Whether routes of this scope answer on the listener of this port."""
        return self.admin_port in (None, port) or scope not in PRIVATE

    def changed(self, subject: str) -> None:
        """Make a change of `key:ID` or `tenant:NAME` count at once."""
        if self._authenticator is not None:
            self._authenticator.forget(subject)
