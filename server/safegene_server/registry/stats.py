"""Counts of revisions, jobs and replicas, and publication times, for metrics.

One short read, whatever the number of tenants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select

from safegene_server.registry import tables
from safegene_server.registry.database import Database, clock
from safegene_server.registry.replicas import ALIVE_S


@dataclass(frozen=True)
class RegistryStats:
    """Counts of `revisions` by state and `jobs` by (kind, state), of one version.

    `since` has the time of publication per tenant. Of the replicas that are alive, `live` have
    applied `version` and `late` have not.
    """

    version: int
    revisions: Mapping[str, int]
    jobs: Mapping[tuple[str, str], int]
    live: int
    late: int
    since: Mapping[str, datetime]


def read_stats(database: Database, *, alive_s: float = ALIVE_S) -> RegistryStats:
    """Read the counts. Errors: RegistryDownError."""
    r, j, p = tables.revisions, tables.jobs, tables.replicas
    a, t = tables.aliases, tables.tenants
    with database.read() as connection:
        version = int(connection.execute(select(tables.version.c.value)).scalar_one())
        revisions = connection.execute(select(r.c.state, func.count()).group_by(r.c.state))
        jobs = connection.execute(
            select(j.c.kind, j.c.state, func.count()).group_by(j.c.kind, j.c.state)
        )
        seen = p.c.seen_at >= clock(connection) - timedelta(seconds=alive_s)
        applied = Counter(
            at == version
            for at in connection.execute(select(p.c.applied_version).where(seen)).scalars()
        )
        since = connection.execute(select(t.c.name, a.c.since).join(t, t.c.id == a.c.tenant_id))
        return RegistryStats(
            version=version,
            revisions={row[0]: row[1] for row in revisions},
            jobs={(kind, state): number for kind, state, number in jobs},
            live=applied[True],
            late=applied[False],
            since={row[0]: row[1] for row in since},
        )
