"""Catalogues in SQLite and in PostgreSQL; each test has one of its own, empty."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from itertools import count
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from scripts.postgres import find_binaries, private_cluster
from server.catalogue.catalogue import Catalogue
from server.catalogue.database import migrate
from server.catalogue.url import parse_url

T = TypeVar("T")
PEPPER = "a pepper of the tests, which is long enough"
NUMBERS = count()


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The URL of a running PostgreSQL."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed")
    with private_cluster(binaries) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request, tmp_path) -> sa.URL:
    """An empty database."""
    if request.param == "sqlite":
        return parse_url(f"sqlite:///{tmp_path}/catalogue.db")
    url = parse_url(request.getfixturevalue("cluster"))
    name = f"catalogue_{next(NUMBERS)}"
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.set(database=name)


@pytest.fixture
def url(empty_url) -> sa.URL:
    """A database with the tables."""
    migrate(empty_url)
    return empty_url


class Clock:
    """Time that a test sets, in seconds."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def using(url, clock) -> Callable[[Callable[[Catalogue], Coroutine[Any, Any, T]]], T]:
    """Runs a coroutine function on a catalogue that is closed afterwards."""

    def run(work: Callable[[Catalogue], Coroutine[Any, Any, T]]) -> T:
        async def scoped() -> T:
            catalogue = Catalogue(url, PEPPER, clock)
            try:
                return await work(catalogue)
            finally:
                await catalogue.close()

        return asyncio.run(scoped())

    return run
