"""Alembic environment: migrations run on the connection and in the transaction of schema.py."""

from __future__ import annotations

from alembic import context

from safegene_server.registry.schema import SCHEMA_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    version_table=SCHEMA_TABLE,
)
context.run_migrations()
