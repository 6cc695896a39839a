"""Connections to the catalogue's database, and its schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from server.errors import ErrorKind, ServiceError

MIGRATIONS = Path(__file__).with_name("migrations")
CONNECTIONS = 8
"""Of one process to the database."""
BUSY_SECONDS = 10
"""How long a connection waits for a writer in another process."""
IMMEDIATE = "IMMEDIATE"


def connect(url: URL) -> Engine:
    """A pool of connections for as many threads."""
    # A connection to a server may have ended while it was in the pool; one to a file does not.
    remote = url.drivername != "sqlite"
    sizes = {"pool_size": CONNECTIONS, "max_overflow": 0}
    engine = create_engine(_with_driver(url), pool_pre_ping=remote, **sizes, **_options(url))
    _prepare(engine)
    if remote:
        event.listen(engine, "connect", _bound_waits)
    return engine


def migrate(url: URL) -> None:
    """Bring the schema to this version. Processes that start together wait for one another.

    Raises ServiceError where the database cannot be opened or was made by a newer version.
    """
    config = _config()
    with _opened(url) as engine:
        _prepare(engine)
        with engine.connect().execution_options(sqlite_begin=IMMEDIATE) as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()


def schema_revisions(url: URL) -> tuple[str | None, str]:
    """The schema's revision, None for an empty database, and that of this version; changes nothing.

    Raises ServiceError as `migrate` does.
    """
    known = ScriptDirectory.from_config(_config())
    with _opened(url) as engine:
        with engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        if current is not None:
            known.get_revision(current)
    return current, str(known.get_current_head())


@contextmanager
def _opened(url: URL) -> Iterator[Engine]:
    """Connections of this thread, and what is wrong with a database or its schema as a ServiceError."""
    engine = create_engine(_with_driver(url), **_options(url))
    try:
        yield engine
    except DBAPIError as error:
        raise _unopened(error) from error
    except CommandError as error:
        raise _newer() from error
    finally:
        engine.dispose()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _unopened(error: DBAPIError) -> ServiceError:
    return ServiceError(ErrorKind.CATALOGUE_DOWN, f"the catalogue cannot be opened: {error.orig}")


def _newer() -> ServiceError:
    return ServiceError(ErrorKind.CATALOGUE_DOWN, "the catalogue was made by a newer version of molex-serve")


def _with_driver(url: URL) -> URL:
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _options(url: URL) -> dict[str, Any]:
    if url.drivername == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    return {"connect_args": {"connect_timeout": BUSY_SECONDS}}


def _bound_waits(connection: Any, _: object) -> None:
    """For a lock of PostgreSQL, as `_options` does it for SQLite."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{BUSY_SECONDS}s'")
    connection.commit()


def _prepare(engine: Engine) -> None:
    """Make SQLite keep foreign keys, log ahead, and begin transactions where SQLAlchemy says so."""
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("sqlite_begin", "")
        connection.exec_driver_sql(f"BEGIN {mode}")
