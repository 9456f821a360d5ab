"""Reading of the audit log: who did what to which object, and when.

Entries are added by the writes themselves; the database rejects changing or deleting one.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import or_, select

from safegene_server.registry import tables
from safegene_server.registry.database import Database
from safegene_server.registry.records import AuditEntry, AuditPage, from_row
from safegene_vllm.errors import RegistryError

_T = tables.audit
MAX_PAGE = 1000


class AuditLog:
    """Audit entries of the registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        cursor: int | None = None,
        limit: int = 100,
    ) -> AuditPage:
        """Return a page of entries, newest first; its `cursor` requests the next page.

        `target` is a family's digest, the name of a key or of a tenant (including its revisions), a
        served name, a replica's id or `job:ID`. An `action` that ends in `.` is a prefix:
        `tenant.`. `since` is inclusive, `until` exclusive. Errors: RegistryError.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise RegistryError(f"limit {limit!r}: expected 1 to {MAX_PAGE}")
        query = select(_T).order_by(_T.c.id.desc()).limit(limit + 1)
        if actor is not None:
            query = query.where(_T.c.actor == actor)
        if action is not None:
            is_prefix = action.endswith(".")
            matches = _T.c.action.startswith(action, autoescape=True)
            query = query.where(matches if is_prefix else _T.c.action == action)
        if target is not None:
            of_tenant = _T.c.target.startswith(f"{target}@", autoescape=True)
            query = query.where(or_(_T.c.target == target, of_tenant))
        if since is not None:
            query = query.where(_T.c.at >= since)
        if until is not None:
            query = query.where(_T.c.at < until)
        if cursor is not None:
            query = query.where(_T.c.id < cursor)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        entries = tuple(from_row(AuditEntry, row) for row in rows[:limit])
        return AuditPage(entries, entries[-1].id if len(rows) > limit else None)
