from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from server.catalogue.database import migrate
from server.catalogue.tables import METADATA
from server.catalogue.url import parse_url
from server.errors import ServiceError


def sync_engine(url: sa.URL) -> sa.Engine:
    driver = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}[url.drivername]
    return sa.create_engine(url.set(drivername=driver), poolclass=sa.NullPool)


def test_the_migrations_make_the_tables_that_the_code_uses(url):
    with sync_engine(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
        assert sa.inspect(connection).get_table_names() != []


def test_migrating_again_changes_nothing(url):
    migrate(url)
    with sync_engine(url).connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM audit_head")).scalar() == 1


def test_processes_that_start_together_take_turns(empty_url):
    url = empty_url.render_as_string(hide_password=False)
    code = (
        "from server.catalogue.database import migrate; from server.catalogue.url import parse_url; "
        f"migrate(parse_url({url!r}))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]


def test_a_migration_that_fails_leaves_nothing(empty_url, monkeypatch):
    monkeypatch.setattr("alembic.op.bulk_insert", None)
    with pytest.raises(TypeError):
        migrate(empty_url)
    with sync_engine(empty_url).connect() as connection:
        assert sa.inspect(connection).get_table_names() == []
    monkeypatch.undo()
    migrate(empty_url)


def test_a_catalogue_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ServiceError, match="cannot be opened"):
        migrate(parse_url(f"sqlite:///{tmp_path}/no/such/folder/c.db"))
    with pytest.raises(ServiceError, match="cannot be opened"):
        migrate(parse_url("postgresql://u:hunter2@127.0.0.1:1/none"))


def test_a_catalogue_of_a_newer_version_is_left_alone(url):
    with sync_engine(url).begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ServiceError, match="newer version"):
        migrate(url)


FORGED = "INTO audit_entries VALUES (1, 0, 'x', '', '', '', '')"
FORGERIES = {
    "sqlite": [f"INSERT OR REPLACE {FORGED}"],
    "postgresql": [
        f"INSERT {FORGED} ON CONFLICT (number) DO UPDATE SET actor = 'x'",
        "TRUNCATE audit_entries",
    ],
}


def test_the_database_refuses_to_change_the_audit_log(using, url):
    using(lambda catalogue: catalogue.record("test", "a", "b", {}))
    plain = ["UPDATE audit_entries SET actor = 'x'", "DELETE FROM audit_entries"]
    for statement in [*plain, *FORGERIES[url.drivername]]:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), sync_engine(url).begin() as connection:
            connection.execute(sa.text(statement))
    [entry] = using(lambda catalogue: catalogue.entries())
    assert entry.actor == "test"


def test_sqlite_logs_ahead(tmp_path):
    """So that those who read and the one who writes do not wait for one another."""
    migrate(parse_url(f"sqlite:///{tmp_path}/catalogue.db"))
    with closing(sqlite3.connect(tmp_path / "catalogue.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "no database URL"),
        ("mysql://x/y", "'mysql'"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ],
)
def test_other_databases_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_url(text)


def test_the_short_name_of_postgresql_is_known():
    assert parse_url("postgres://u@h/d").drivername == "postgresql"
