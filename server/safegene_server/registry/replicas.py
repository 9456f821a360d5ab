"""Replicas: running server processes, the version each has applied, and their receipts.

Replicas follow the version by themselves; what they report here is for observers.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write, clock
from safegene_server.registry.positions import still_contains
from safegene_server.registry.records import (
    Identity,
    Position,
    Replica,
    ReplicaReceipt,
    from_row,
)
from safegene_server.registry.revisions import find_identities
from safegene_vllm.errors import NotFoundError, RegistryError, RestoredError

_T = tables.replicas
ALIVE_S = 10.0
"""A replica without a heartbeat for this long no longer counts as alive."""
RETENTION_S = 24 * 3600.0
"""Rows of silent replicas are deleted after this time."""


class Replicas:
    """Replicas of the registry and their receipts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def join(self, host: str, pid: int, *, actor: str) -> Replica:
        """Register a new replica with nothing applied, and delete long silent ones."""
        validation.line(host, "host", 255)
        replica = str(uuid.uuid4())
        with self._database.write(actor, exclusive=False) as write:
            silent = _T.c.seen_at < write.now - timedelta(seconds=RETENTION_S)
            deleted = write.connection.execute(delete(_T).where(silent).returning(_T.c.id))
            forgotten = sorted(deleted.scalars())
            write.insert(
                _T,
                id=replica,
                host=host,
                pid=pid,
                started_at=write.now,
                seen_at=write.now,
                applied_version=0,
                faults=[],
            )
            write.audit("replica.join", replica, host=host, pid=pid, forgotten=forgotten)
            return _find(write.connection, replica)

    def heartbeat(
        self,
        replica: str,
        *,
        applied_version: int,
        faults: Iterable[str] = (),
        receipts: Mapping[int, tuple[Mapping[str, Any], bool]] | None = None,
        gone: Iterable[int] = (),
        contents: Iterable[Identity] = (),
        seen: Position | None = None,
        actor: str,
    ) -> Replica:
        """Record a heartbeat with its receipts; it is audited when its content changed.

        `receipts` by revision id, each with whether it matches its files, replace older ones;
        `gone` are revisions that the replica has unloaded. A receipt of one of `contents` that the
        registry has as other content, or not at all, is left out. `seen` is the position that the
        replica follows.

        Errors: NotFoundError for a replica that left or was deleted: join again; RestoredError
        for one that has `seen` a position that the registry has lost; RegistryError.
        """
        reported = [str(fault) for fault in faults]
        new = {
            revision: (validation.plain(receipt, "receipt"), ok)
            for revision, (receipt, ok) in (receipts or {}).items()
        }
        unloaded = sorted(set(gone) - new.keys())
        known = {content.id: content for content in contents}
        if type(applied_version) is not int or applied_version < 0:
            raise RegistryError(f"applied_version {applied_version!r}: expected a whole number")
        with self._database.write(actor, exclusive=False) as write:
            before = _find(write.connection, replica, seen)
            write.connection.execute(
                update(_T)
                .where(_T.c.id == replica)
                .values(seen_at=write.now, applied_version=applied_version, faults=reported)
            )
            if new or unloaded:
                _put_receipts(write, replica, new, unloaded, known)
            if (before.applied_version, list(before.faults)) == (applied_version, reported):
                write.skip_audit()
            else:
                write.audit("replica.state", replica, version=applied_version, faults=reported)
            return _find(write.connection, replica)

    def leave(self, replica: str, *, actor: str) -> None:
        """Delete a replica that stops, with its receipts. Errors: NotFoundError."""
        with self._database.write(actor, exclusive=False) as write:
            _find(write.connection, replica)
            write.connection.execute(delete(_T).where(_T.c.id == replica))
            write.audit("replica.leave", replica)

    def list(self, *, alive_s: float = ALIVE_S) -> tuple[Replica, ...]:
        """Return the replicas seen within `alive_s`, oldest first."""
        with self._database.read() as connection:
            return find_alive(connection, clock(connection), alive_s)

    def receipts(
        self, *, replica: str | None = None, revision: int | None = None
    ) -> tuple[ReplicaReceipt, ...]:
        """Return the receipts of one replica, of one revision, or all."""
        rows = tables.receipts
        query = select(rows).order_by(rows.c.replica_id, rows.c.revision_id)
        if replica is not None:
            query = query.where(rows.c.replica_id == replica)
        if revision is not None:
            query = query.where(rows.c.revision_id == revision)
        with self._database.read() as connection:
            return tuple(
                from_row(ReplicaReceipt, row, replica=row.replica_id, revision=row.revision_id)
                for row in connection.execute(query)
            )


def _put_receipts(
    write: Write,
    replica: str,
    receipts: Mapping[int, tuple[Mapping[str, Any], bool]],
    gone: list[int],
    contents: Mapping[int, Identity],
) -> None:
    """Replace receipts of a replica. Errors: NotFoundError."""
    rows = tables.receipts
    known = find_identities(write.connection, [*receipts])
    accepted = {
        revision: receipt
        for revision, receipt in receipts.items()
        if revision not in contents or known.get(revision) == contents[revision]
    }
    if unknown := sorted(accepted.keys() - known.keys()):
        raise NotFoundError(f"no revisions with ids {unknown}")
    write.connection.execute(
        delete(rows).where(rows.c.replica_id == replica, rows.c.revision_id.in_([*receipts, *gone]))
    )
    for revision, (receipt, ok) in accepted.items():
        write.insert(
            rows,
            replica_id=replica,
            revision_id=revision,
            receipt=receipt,
            ok=bool(ok),
            at=write.now,
        )
    write.audit(
        "replica.receipts",
        replica,
        ok=sorted(key for key, (_, ok) in accepted.items() if ok),
        failed=sorted(key for key, (_, ok) in accepted.items() if not ok),
        gone=gone,
    )


def find_receipts(connection: Connection, revisions: list[int]) -> dict[tuple[str, int], bool]:
    """Read whether each receipt of `revisions` is good, by replica and revision id."""
    rows = tables.receipts
    query = select(rows.c.replica_id, rows.c.revision_id, rows.c.ok)
    found = connection.execute(query.where(rows.c.revision_id.in_(revisions)))
    return {(row.replica_id, row.revision_id): row.ok for row in found}


def find_alive(connection: Connection, now: datetime, alive_s: float) -> tuple[Replica, ...]:
    """Read the replicas seen within `alive_s` before `now`, oldest first."""
    seen = _T.c.seen_at >= now - timedelta(seconds=alive_s)
    query = select(_T).where(seen).order_by(_T.c.started_at, _T.c.id)
    return tuple(from_row(Replica, row) for row in connection.execute(query))


def _find(connection: Connection, replica: str, seen: Position | None = None) -> Replica:
    query = select(_T, still_contains(seen).label("follows")).where(_T.c.id == replica)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"no replica {replica!r:.100} in the registry; join again")
    if not row.follows:
        raise RestoredError(
            f"replica {replica} has seen changes that the registry has lost; nothing was changed: "
            "reconcile with the registry as it is now, then join again"
        )
    return from_row(Replica, row)
