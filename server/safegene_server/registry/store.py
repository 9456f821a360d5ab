"""Registry of families, tenants, revisions, keys, replicas and jobs in one database.

Every write takes an `actor`, is one transaction, adds an audit entry, and raises the version if
replicas must follow; counts of usage are the exception, without actor and entry. Calls block: run
them in a thread when called from a coroutine.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import URL, select

from safegene_server.registry import tables
from safegene_server.registry.audit import AuditLog
from safegene_server.registry.database import Database
from safegene_server.registry.families import Families
from safegene_server.registry.jobs import Jobs
from safegene_server.registry.keys import Keys, usable_keys
from safegene_server.registry.policies import Policies
from safegene_server.registry.positions import find_position
from safegene_server.registry.records import Position, Snapshot
from safegene_server.registry.replicas import ALIVE_S, Replicas
from safegene_server.registry.revisions import Revisions, revision_of, revision_query
from safegene_server.registry.rollouts import Rollouts, previous_ids
from safegene_server.registry.schema import open_schema
from safegene_server.registry.stats import RegistryStats, read_stats
from safegene_server.registry.tenants import Tenants, current_tenants
from safegene_server.registry.usage import Usage


class Registry:
    """One open registry, safe to share between threads but not between processes."""

    def __init__(self, url: str | Path | URL, *, migrate: bool = True) -> None:
        """Open the database at `url` (a file's path, `sqlite:///FILE`, `postgresql://...`).

        An empty one gets its tables, an older one is upgraded unless `migrate=False`.
        Errors: ConfigError (url), SchemaError (newer or foreign), RegistryDownError.
        """
        self.database = Database(url)
        self.families = Families(self.database)
        self.tenants = Tenants(self.database)
        self.revisions = Revisions(self.database)
        self.rollouts = Rollouts(self.database)
        self.policies = Policies(self.database)
        self.keys = Keys(self.database)
        self.replicas = Replicas(self.database)
        self.jobs = Jobs(self.database)
        self.audit = AuditLog(self.database)
        self.usage = Usage(self.database)
        try:
            open_schema(self.database, migrate=migrate)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection. The registry must not be used afterwards."""
        self.database.close()

    def version(self) -> int:
        """Version, which grows by one with every change that replicas must follow. Cheap."""
        with self.database.read() as connection:
            return int(connection.execute(select(tables.version.c.value)).scalar_one())

    def position(self, seen: Position | None = None) -> tuple[Position, bool]:
        """Position of the registry, and whether it has lost what was `seen`. Cheap."""
        with self.database.read() as connection:
            return find_position(connection, seen)

    def stats(self, *, alive_s: float = ALIVE_S) -> RegistryStats:
        """Counts for metrics. Errors: RegistryDownError."""
        return read_stats(self.database, alive_s=alive_s)

    def snapshot(self, seen: Position | None = None) -> Snapshot:
        """Everything that replicas follow, in one consistent read, for a reader that has `seen`."""
        revisions = tables.revisions
        with self.database.read() as connection:
            position, lost = find_position(connection, seen)
            tenants = current_tenants(connection)
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
