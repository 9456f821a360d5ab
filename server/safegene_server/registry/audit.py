"""Reads the audit: who did what to what, when. Rows are written by the writes themselves.

There is no way to change or delete a row: the database refuses it.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import or_, select

from safegene_server.registry import tables
from safegene_server.registry.database import Database
from safegene_server.registry.records import AuditEntry, AuditPage
from safegene_vllm.errors import RegistryError

_T = tables.audit
LARGEST_PAGE = 1000


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
        """A page, the newest first; `cursor` of one page asks for the next.

        `target` is a family's digest, a key's or a tenant's name (its revisions with it), a
        served name, a replica's id or `job:ID`. `action` may end in `.`: `tenant.` is all of a
        kind. `since` is part of the time asked for, `until` is not. Errors: RegistryError.
        """
        if not 1 <= limit <= LARGEST_PAGE:
            raise RegistryError(f"limit {limit!r}: expected 1 to {LARGEST_PAGE}")
        query = select(_T).order_by(_T.c.id.desc()).limit(limit + 1)
        if actor is not None:
            query = query.where(_T.c.actor == actor)
        if action is not None:
            of_kind = action.endswith(".")
            query = query.where(
                _T.c.action.startswith(action, autoescape=True)
                if of_kind
                else _T.c.action == action
            )
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
        entries = tuple(
            AuditEntry(row.id, row.at, row.actor, row.action, row.target, row.details)
            for row in rows[:limit]
        )
        return AuditPage(entries, entries[-1].id if len(rows) > limit else None)
