"""Positions in a registry's history, and whether the registry has lost one that was seen.

Every write adds an audit entry, and no entry is ever changed or deleted. So a registry without the
newest entry that was seen has lost it: it was restored from a backup, failed over to a standby that
lagged, or was replaced. Versions alone do not show that: a restored registry may reach them again.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, exists, func, or_, select, true

from safegene_server.registry import tables
from safegene_server.registry.records import Position
from safegene_vllm.errors import RegistryDownError

_A, _V = tables.audit, tables.version
_ENTRY = (_A.c.id, _A.c.at, _A.c.actor, _A.c.action, _A.c.target)


def find_position(connection: Connection, seen: Position | None) -> tuple[Position, bool]:
    """Read the registry's position, and whether it has lost `seen`, in one statement.

    Errors: RegistryDownError for a database that is being restored.
    """
    newest = select(func.max(_A.c.id)).scalar_subquery()
    wanted = _A.c.id == newest
    if seen is not None and seen.entry is not None:
        wanted = or_(wanted, _A.c.id == seen.entry[0])
    query = select(_V.c.value, *_ENTRY).select_from(_V.outerjoin(_A, wanted)).order_by(_A.c.id)
    rows = connection.execute(query).all()
    if not rows:
        raise RegistryDownError("the registry has no version: it is being restored; try again")
    found = Position(int(rows[-1].value), _entry_of(rows[-1]))
    return found, _is_lost(found.version, [_entry_of(row) for row in rows], seen)


def still_contains(seen: Position | None) -> ColumnElement[bool]:
    """Condition that the registry still contains the position `seen`, to be part of a query."""
    if seen is None:
        return true()
    version = select(_V.c.value).scalar_subquery() >= seen.version
    if seen.entry is None:
        return version
    same = [column == value for column, value in zip(_ENTRY, seen.entry, strict=True)]
    return and_(version, exists().where(*same))


def _is_lost(version: int, entries: list[Any], seen: Position | None) -> bool:
    if seen is None:
        return False
    return version < seen.version or (seen.entry is not None and seen.entry not in entries)


def _entry_of(row: Any) -> Any:
    return None if row.id is None else (row.id, row.at, row.actor, row.action, row.target)
