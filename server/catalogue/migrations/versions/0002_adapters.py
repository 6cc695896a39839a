"""Adapters, their versions and aliases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(192), nullable=False),
        sa.Column("tenant", sa.String(64)),
        sa.Column("current", sa.BigInteger),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_adapters_tenant"),
        sa.PrimaryKeyConstraint("name", name="pk_adapters"),
    )
    op.create_index("ix_adapters_tenant", "adapters", ["tenant"])
    op.create_table(
        "adapter_versions",
        sa.Column("adapter", sa.String(192), nullable=False),
        sa.Column("number", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("base", sa.String(128)),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("digest", sa.String(80)),
        sa.Column("size", sa.BigInteger),
        sa.Column("kind", sa.String(16)),
        sa.Column("task", sa.String(16)),
        sa.Column("labels", sa.Text),
        sa.Column("config", sa.Text),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_adapter_versions_adapter"),
        sa.PrimaryKeyConstraint("adapter", "number", name="pk_adapter_versions"),
    )
    op.create_table(
        "adapter_aliases",
        sa.Column("adapter", sa.String(192), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name="fk_adapter_aliases_adapter"),
        sa.PrimaryKeyConstraint("adapter", "alias", name="pk_adapter_aliases"),
    )
