"""Transactions of the catalogue, each as a whole on a thread: its statements need no event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import URL, Connection
from sqlalchemy.exc import InterfaceError, OperationalError

from server.catalogue import audit
from server.catalogue.database import CONNECTIONS, connect
from server.errors import ErrorKind, ServiceError
from server.pool import Pool

P = ParamSpec("P")
T = TypeVar("T")

TURN_SECONDS = 30
"""How long a transaction waits for others to leave a connection."""


class Transactions:
    """Carries out what is to be done with a connection.

    Raises ServiceError: 503 while the database cannot be reached.
    """

    def __init__(self, url: URL) -> None:
        self._engine = connect(url)
        self._pool = Pool(CONNECTIONS, "catalogue")
        self._turns = asyncio.Semaphore(CONNECTIONS)

    def close(self) -> None:
        self._pool.close()
        self._engine.dispose()

    async def read(self, work: Callable[[Connection], T]) -> T:
        """The result of queries."""
        return await self._run(self._reading, work)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """The result of a transaction that no other writer overlaps."""
        return await self._run(self._writing, work)

    async def _run(self, way: Callable[[Callable[[Connection], T]], T], work: Callable[[Connection], T]) -> T:
        """A caller that is cancelled waits for the end: what it changes next comes after this."""
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._turns.acquire()
        except TimeoutError as error:
            raise _unreachable() from error
        try:
            running = asyncio.ensure_future(self._pool.run(way, work))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait({running})
                raise
        finally:
            self._turns.release()

    def _reading(self, work: Callable[[Connection], T]) -> T:
        with self._connected() as connection:
            return work(connection)

    def _writing(self, work: Callable[[Connection], T]) -> T:
        with self._connected() as connection, connection.begin():
            audit.lock(connection)
            return work(connection)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except (OperationalError, InterfaceError) as error:
            raise _unreachable() from error


class Transactional(Protocol):
    """What has methods that are transactions."""

    @property
    def transactions(self) -> Transactions: ...


Owner = TypeVar("Owner", bound=Transactional)
Method = Callable[Concatenate[Owner, Connection, P], T]
Awaited = Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]]


def reads(method: Method[Owner, P, T]) -> Awaited[Owner, P, T]:
    """Let a method that makes queries be called without its connection, and awaited."""

    @wraps(method)
    async def run(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await owner.transactions.read(lambda connection: method(owner, connection, *args, **kwargs))

    return run


def writes(method: Method[Owner, P, T]) -> Awaited[Owner, P, T]:
    """The same of a method that is one transaction, its audit entry included."""

    @wraps(method)
    async def run(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await owner.transactions.write(lambda connection: method(owner, connection, *args, **kwargs))

    return run


def _unreachable() -> ServiceError:
    message = "the catalogue cannot be reached; try again"
    return ServiceError(ErrorKind.CATALOGUE_DOWN, message, retry_after=5)
