"""The registry's public face: everything it can do, on one database given by URL.

For everybody else in the server. Every write takes the `actor`, is one transaction, leaves an audit
row, and raises the version if replicas must follow. Calls block: from a coroutine, use a thread.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import URL, select

from safegene_server.registry import tables
from safegene_server.registry.audit_log import AuditLog
from safegene_server.registry.families import Families
from safegene_server.registry.jobs import Jobs
from safegene_server.registry.keys import Keys, usable_keys
from safegene_server.registry.policies import Policies
from safegene_server.registry.positions import find_position
from safegene_server.registry.publishing import Publishing, previous_ids
from safegene_server.registry.records import Position, Snapshot
from safegene_server.registry.replicas import Replicas
from safegene_server.registry.revisions import Revisions, revision_of, revision_query
from safegene_server.registry.schema import open_schema
from safegene_server.registry.stats import StatsQueries
from safegene_server.registry.tenants import Tenants, living_tenants


class Registry(
    Families, Tenants, Revisions, Publishing, Policies, Keys, Replicas, Jobs, AuditLog, StatsQueries
):
    """One registry; safe to share between threads, opened anew by every process."""

    def __init__(self, url: str | Path | URL, *, migrate: bool = True) -> None:
        """Open the database at `url` (a file's path, `sqlite:///FILE`, `postgresql://...`).

        An empty one gets its tables, an older one is brought up to date unless `migrate=False`.
        Errors: ConfigError (url), SchemaError (newer or foreign), RegistryDownError.
        """
        super().__init__(url)
        try:
            open_schema(self, migrate=migrate)
        except BaseException:
            self.close()
            raise

    def version(self) -> int:
        """Grows by one with every change that replicas must follow; cheap to ask."""
        with self.read() as connection:
            return int(connection.execute(select(tables.version.c.value)).scalar_one())

    def position(self, seen: Position | None = None) -> tuple[Position, bool]:
        """Read how far the registry is, and whether it has lost what was `seen`; cheap."""
        with self.read() as connection:
            return find_position(connection, seen)

    def snapshot(self, seen: Position | None = None) -> Snapshot:
        """What replicas follow, in one consistent read, for a reader that had `seen` so much."""
        revisions = tables.revisions
        with self.read() as connection:
            position, lost = find_position(connection, seen)
            tenants = living_tenants(connection)
            alive = tables.tenants.c.state != "retired"
            query = revision_query().where(alive).order_by(revisions.c.id)
            published = connection.execute(query.where(revisions.c.state == "published"))
            previous = connection.execute(query.where(revisions.c.id.in_(previous_ids())))
            return Snapshot(
                version=position.version,
                tenants=tenants,
                revisions=tuple(revision_of(row) for row in published),
                previous=tuple(revision_of(row) for row in previous),
                keys=usable_keys(connection),
                position=position,
                lost=lost,
            )
