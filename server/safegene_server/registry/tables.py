"""Tables of the registry, as SQLAlchemy queries them. Migrations create them.

Content that may never change, and rows that may never be deleted, are guarded by triggers in the
database itself (migrations/versions).
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


class UtcDateTime(TypeDecorator[datetime]):
    """Timestamp in UTC; SQLite, which has no time zones, stores it without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        timestamp = value.astimezone(UTC)
        return timestamp.replace(tzinfo=None) if dialect.name == "sqlite" else timestamp

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


def _json() -> JSON:
    # Stored as text on PostgreSQL too: JSONB rewrites numbers, and digests are over the numbers.
    return JSON(none_as_null=True)


version = Table(
    "version",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="one_row"), primary_key=True),
    Column("value", Integer, nullable=False),
)

families = Table(
    "families",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("name", Text, nullable=False),
    Column("header", _json(), nullable=False),
    Column("source", Text),
    Column("created_at", UtcDateTime, nullable=False),
)

policies = Table(
    "policies",
    metadata,
    Column("family_digest", ForeignKey(families.c.digest), primary_key=True),
    Column("floor", _json(), nullable=False),
    Column("frozen", Boolean, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(127), nullable=False, unique=True),
    Column("family_digest", ForeignKey(families.c.digest), nullable=False),
    Column("source", Text),
    Column("state", String(16), nullable=False),
    Column("limits", _json(), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    sqlite_autoincrement=True,
)

revisions = Table(
    "revisions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant_id", ForeignKey(tenants.c.id), nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("adapter_digest", String(71)),
    Column("profile_digest", String(71), nullable=False),
    Column("profile", _json(), nullable=False),
    Column("source", Text),
    Column("state", String(16), nullable=False),
    Column("reasons", _json(), nullable=False),
    Column("gate", _json(), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", Text, nullable=False),
    UniqueConstraint("tenant_id", "number"),
    sqlite_autoincrement=True,
)

aliases = Table(
    "aliases",
    metadata,
    Column("tenant_id", ForeignKey(tenants.c.id), primary_key=True),
    Column("revision_id", ForeignKey(revisions.c.id), nullable=False, unique=True),
    Column("since", UtcDateTime, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("tenants", _json(), nullable=False),
    Column("revisions", _json(), nullable=False),
    Column("version", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", Text, nullable=False),
    sqlite_autoincrement=True,
)

publications = Table(
    "publications",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant_id", ForeignKey(tenants.c.id), nullable=False, index=True),
    Column("revision_id", ForeignKey(revisions.c.id), nullable=False),
    Column("rollout_id", ForeignKey(rollouts.c.id), nullable=False),
    Column("undone", Boolean, nullable=False),
    sqlite_autoincrement=True,
)

keys = Table(
    "keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("prefix", String(8), nullable=False),
    Column("scopes", _json(), nullable=False),
    Column("tenants", _json(), nullable=False),
    Column("default_tenant", String(127)),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    sqlite_autoincrement=True,
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("seen_at", UtcDateTime, nullable=False),
    Column("applied_version", Integer, nullable=False),
    Column("faults", _json(), nullable=False),
)

receipts = Table(
    "receipts",
    metadata,
    Column("replica_id", ForeignKey(replicas.c.id, ondelete="CASCADE"), primary_key=True),
    Column("revision_id", ForeignKey(revisions.c.id), primary_key=True),
    Column("receipt", _json(), nullable=False),
    Column("ok", Boolean, nullable=False),
    Column("at", UtcDateTime, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("tenant_id", ForeignKey(tenants.c.id), nullable=False),
    Column("revision_id", ForeignKey(revisions.c.id)),
    Column("params", _json(), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("progress", Float, nullable=False),
    Column("message", Text, nullable=False),
    Column("result", _json()),
    Column("attempts", Integer, nullable=False),
    Column("owner", Text),
    Column("lease_until", UtcDateTime),
    Column("cancel_requested", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False, index=True),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("details", _json(), nullable=False),
    Index("ix_audit_target_id", "target", "id"),
    sqlite_autoincrement=True,
)

usage = Table(
    "usage",
    metadata,
    Column("day", Date, primary_key=True),
    # Neither is a foreign key: the base model has no row, and counts outlive what they name.
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
