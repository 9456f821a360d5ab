"""Usage: requests and tokens by day, tenant and key, added up over all replicas.

There is one row per day and pair of a tenant and a key that sent requests; days out of the
retention period are deleted. Counts are no change that replicas follow, and are not audited.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

from sqlalchemy import and_, delete, or_, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database
from safegene_server.registry.records import UsageCursor, UsagePage, UsageRow, from_row
from safegene_vllm.errors import RegistryError

_T = tables.usage
_KEY = (_T.c.day, _T.c.tenant, _T.c.key)
_COUNTS = ("requests", "prompt_tokens", "completion_tokens")
_ACTOR = "usage"
MAX_PAGE = 1000


class Usage:
    """Usage rows of the registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, rows: Iterable[UsageRow]) -> None:
        """Add the counts of `rows` to those of the same day, tenant and key, all or none.

        Errors: RegistryError for a count that is negative or no whole number; RegistryDownError.
        """
        values = [_checked(row) for row in rows]
        if not values:
            return
        # In one order for all writers: two that wait for each other's rows would never end.
        values.sort(key=lambda value: (value["day"], value["tenant"], value["key"]))
        kind = postgresql if self._database.is_postgresql else sqlite
        added = kind.insert(_T)
        sums = {name: _T.c[name] + added.excluded[name] for name in _COUNTS}
        with self._database.write(_ACTOR, exclusive=False) as write:
            upsert = added.on_conflict_do_update(index_elements=_KEY, set_=sums)
            write.connection.execute(upsert, values)
            write.skip_audit()

    def delete_before(self, day: date) -> int:
        """Delete the rows of the days before `day`; return how many there were."""
        with self._database.write(_ACTOR, exclusive=False) as write:
            deleted = write.connection.execute(delete(_T).where(_T.c.day < day))
            write.skip_audit()
            return deleted.rowcount

    def list(
        self,
        *,
        since: date | None = None,
        until: date | None = None,
        tenants: Iterable[str] | None = None,
        key: str | None = None,
        cursor: UsageCursor | None = None,
        limit: int = 100,
    ) -> UsagePage:
        """Return a page of rows, newest day first, then by tenant and key.

        `since` and `until` are the first and the last day; `tenants` None are all of them. The
        page's `cursor` requests the next one. Errors: RegistryError.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise RegistryError(f"limit {limit!r}: expected 1 to {MAX_PAGE}")
        query = select(_T).order_by(_T.c.day.desc(), _T.c.tenant, _T.c.key).limit(limit + 1)
        if since is not None:
            query = query.where(_T.c.day >= since)
        if until is not None:
            query = query.where(_T.c.day <= until)
        if tenants is not None:
            query = query.where(_T.c.tenant.in_(sorted(tenants)))
        if key is not None:
            query = query.where(_T.c.key == key)
        if cursor is not None:
            day, *names = cursor
            same_day = and_(_T.c.day == day, tuple_(_T.c.tenant, _T.c.key) > tuple_(*names))
            query = query.where(or_(_T.c.day < day, same_day))
        with self._database.read() as connection:
            rows = tuple(from_row(UsageRow, row) for row in connection.execute(query))
        if len(rows) <= limit:
            return UsagePage(rows, None)
        last = rows[limit - 1]
        return UsagePage(rows[:limit], (last.day, last.tenant, last.key))


def _checked(row: UsageRow) -> dict[str, date | str | int]:
    """Return the columns of a row. Errors: RegistryError."""
    counts: dict[str, date | str | int] = {}
    for name in _COUNTS:
        value = getattr(row, name)
        if type(value) is not int or value < 0:
            raise RegistryError(f"usage: {name} = {value!r}, expected a whole number from 0")
        counts[name] = value
    tenant, key = validation.text(row.tenant), validation.text(row.key)
    return {"day": row.day, "tenant": tenant, "key": key, **counts}
