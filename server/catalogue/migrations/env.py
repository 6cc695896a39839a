"""How alembic runs the migrations: in the one transaction that the caller has opened."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from server.catalogue.tables import METADATA

LOCK = 7_203_914_001
"""Held while a PostgreSQL schema changes, so that servers that start together take turns."""

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
context.configure(connection=connection, target_metadata=METADATA, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
