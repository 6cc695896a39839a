"""The tables. `migrations/` creates them; a test holds the two together."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    MetaData,
    String,
    Table,
    Text,
)

METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

tenants = Table(
    "tenants",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("created", BigInteger, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrency", BigInteger),
    Column("adapters", BigInteger),
    Column("adapter_bytes", BigInteger),
)

api_keys = Table(
    "api_keys",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.name"), nullable=False, index=True),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", String(256), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),
    Column("revoked", BigInteger),
)

# `last` is the newest number that was given to a version: no number means two things, as long as the adapter
# is there.
adapters = Table(
    "adapters",
    METADATA,
    Column("name", String(192), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.name"), index=True),
    Column("current", BigInteger),
    Column("last", BigInteger, nullable=False),
)

# What `labels` and `config` hold is JSON. All that is null is not known before the files were read.
adapter_versions = Table(
    "adapter_versions",
    METADATA,
    Column("adapter", String(192), ForeignKey("adapters.name"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("source", Text, nullable=False),
    Column("base", String(128)),
    Column("pinned", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("digest", String(80)),
    Column("size", BigInteger),
    Column("kind", String(16)),
    Column("task", String(16)),
    Column("labels", Text),
    Column("config", Text),
    Column("actor", String(64), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("updated", BigInteger, nullable=False),
)

adapter_aliases = Table(
    "adapter_aliases",
    METADATA,
    Column("adapter", String(192), ForeignKey("adapters.name"), primary_key=True),
    Column("alias", String(64), primary_key=True),
    Column("number", BigInteger, nullable=False),
)

audit_entries = Table(
    "audit_entries",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("time", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("detail", Text, nullable=False),
    Column("hash", String(64), nullable=False),
)

# One row: the number and the hash of the newest entry. Whoever writes takes its lock first, so that
# writers of all processes follow one another, and a log that lost its end is seen.
audit_head = Table(
    "audit_head",
    METADATA,
    Column(
        "id", BigInteger, CheckConstraint("id = 1", name="one_row"), primary_key=True, autoincrement=False
    ),
    Column("number", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)
