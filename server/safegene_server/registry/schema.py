"""Upgrade of a database to this release's schema, or its rejection.

Runs the migrations in migrations/versions with Alembic in one transaction, while other replicas
that start wait. A new migration is one more module there, and HEAD.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, column, func, inspect, select, table
from sqlalchemy.exc import DatabaseError

from safegene_server.registry import tables
from safegene_server.registry.database import Database
from safegene_vllm.errors import RegistryDownError, SchemaError

HEAD = "0002"
"""The newest migration, which this release needs."""

SCHEMA_TABLE = "safegene_schema"
MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x5AFE6E4E


def open_schema(database: Database, *, migrate: bool) -> None:
    """Upgrade the schema to HEAD. With `migrate=False` any other schema is rejected.

    Errors: SchemaError, RegistryDownError.
    """
    try:
        with database.read() as connection:
            found = _found(connection)
        if found == HEAD:
            return
        _check_not_newer(database, found)
        if not migrate:
            raise SchemaError(
                f"{_shown(database)} has schema {found or 'none'}, this release needs {HEAD}; let "
                "one server start with migration allowed"
            )
        _upgrade(database)
    except DatabaseError as error:
        raise RegistryDownError(
            f"{_shown(database)} cannot be used as a registry: {error.orig}"
        ) from error


def _upgrade(database: Database) -> None:
    with database.translate_errors(), database.engine.connect() as connection:
        connection.execution_options(safegene="write")
        with connection.begin():
            if database.is_postgresql:
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            found = _found(connection)
            _check_not_newer(database, found)
            if found is None and (foreign := _names(connection) & set(tables.metadata.tables)):
                raise SchemaError(
                    f"{_shown(database)} holds tables of another application ({sorted(foreign)}); "
                    "give the registry a database of its own"
                )
            _run_migrations(connection)


def _check_not_newer(database: Database, found: str | None) -> None:
    if found is not None and found > HEAD:
        raise SchemaError(
            f"{_shown(database)} has schema {found}, which is newer than this release knows (up to "
            f"{HEAD}); use the newer release"
        )


def _names(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


def _found(connection: Connection) -> str | None:
    """Read the schema's version; None for a database without one."""
    if not inspect(connection).has_table(SCHEMA_TABLE):
        return None
    number: Select[Any] = select(column("version_num")).select_from(table(SCHEMA_TABLE))
    found: str | None = connection.execute(number).scalar_one_or_none()
    return found


def _run_migrations(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    # A ConfigParser interpolates "%".
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    command.upgrade(config, HEAD)


def _shown(database: Database) -> str:
    return f"registry {database.url.render_as_string(hide_password=True)}"
