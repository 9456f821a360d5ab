"""Replicas: which server processes there are, what each has applied, and how far a rollout is.

For reporting only: no replica is told anything here, each follows the version by itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write, clock
from safegene_server.registry.positions import still_has
from safegene_server.registry.records import (
    Identity,
    Position,
    Replica,
    ReplicaReceipt,
)
from safegene_server.registry.revisions import find_identities
from safegene_vllm.errors import NotFoundError, RegistryError, RestoredError

_T = tables.replicas
ALIVE_S = 10.0
"""How long after its last sign of life a replica still counts."""
FORGET_S = 24 * 3600.0
"""How long a silent replica's row is kept."""


class Replicas:
    """Replicas of the registry and their receipts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def join(self, host: str, pid: int, *, actor: str) -> Replica:
        """A new replica, alive and with nothing applied; long silent ones are forgotten."""
        validation.line(host, "host", 255)
        fresh = str(uuid.uuid4())
        with self._database.write(actor, exclusive=False) as write:
            silent = _T.c.seen_at < write.now - timedelta(seconds=FORGET_S)
            gone = write.connection.execute(delete(_T).where(silent).returning(_T.c.id)).scalars()
            forgotten = sorted(gone)
            write.connection.execute(
                insert(_T).values(
                    id=fresh,
                    host=host,
                    pid=pid,
                    started_at=write.now,
                    seen_at=write.now,
                    applied_version=0,
                    faults=[],
                )
            )
            write.audit("replica.join", fresh, host=host, pid=pid, forgotten=forgotten)
            return _find(write.connection, fresh)

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
        """A sign of life, audited when it says something new, with the receipts it brings.

        `receipts` by revision id, each with whether it keeps its promise, replace older ones;
        `gone` are revisions that the replica holds no more. A receipt of one of `contents` that the
        registry knows as other content, or not at all, is left out. `seen` is how far the replica
        follows.

        Errors: NotFoundError for a replica that left or was forgotten: join again; RestoredError
        for one that has `seen` what the registry has lost; RegistryError.
        """
        told = [str(fault) for fault in faults]
        fresh = _receipts_to_put(receipts or {}, gone)
        known = {content.id: content for content in contents}
        if type(applied_version) is not int or applied_version < 0:
            raise RegistryError(f"applied_version {applied_version!r}: expected a whole number")
        with self._database.write(actor, exclusive=False) as write:
            before = _find(write.connection, replica, seen)
            write.connection.execute(
                update(_T)
                .where(_T.c.id == replica)
                .values(seen_at=write.now, applied_version=applied_version, faults=told)
            )
            if fresh.kept or fresh.gone:
                _put_receipts(write, replica, fresh, known)
            if (before.applied_version, list(before.faults)) == (applied_version, told):
                write.unaudited()
            else:
                write.audit("replica.state", replica, version=applied_version, faults=told)
            return _find(write.connection, replica)

    def leave(self, replica: str, *, actor: str) -> None:
        """The replica ends in good order; its receipts go with it. Errors: NotFoundError."""
        with self._database.write(actor, exclusive=False) as write:
            _find(write.connection, replica)
            write.connection.execute(delete(_T).where(_T.c.id == replica))
            write.audit("replica.leave", replica)

    def list(self, *, alive_s: float = ALIVE_S) -> tuple[Replica, ...]:
        """Those seen within `alive_s`, the oldest first."""
        with self._database.read() as connection:
            return find_alive(connection, clock(connection), alive_s)

    def receipts(
        self, *, replica: str | None = None, revision: int | None = None
    ) -> tuple[ReplicaReceipt, ...]:
        """The receipts of one replica, of one revision, or all."""
        rows = tables.receipts
        query = select(rows).order_by(rows.c.replica_id, rows.c.revision_id)
        if replica is not None:
            query = query.where(rows.c.replica_id == replica)
        if revision is not None:
            query = query.where(rows.c.revision_id == revision)
        with self._database.read() as connection:
            return tuple(
                ReplicaReceipt(row.replica_id, row.revision_id, row.receipt, row.ok, row.at)
                for row in connection.execute(query)
            )


@dataclass(frozen=True)
class _Fresh:
    """Receipts by revision id, and the revisions that have none any more."""

    kept: Mapping[int, tuple[Mapping[str, Any], bool]]
    gone: Sequence[int]


def _receipts_to_put(
    receipts: Mapping[int, tuple[Mapping[str, Any], bool]], gone: Iterable[int]
) -> _Fresh:
    """Errors: RegistryError."""
    kept = {key: (validation.plain(value, "receipt"), ok) for key, (value, ok) in receipts.items()}
    return _Fresh(kept, sorted(set(gone) - set(kept)))


def _put_receipts(
    write: Write, replica: str, fresh: _Fresh, contents: Mapping[int, Identity]
) -> None:
    """Errors: NotFoundError."""
    rows = tables.receipts
    known = find_identities(write.connection, list(fresh.kept))
    kept = {
        revision: told
        for revision, told in fresh.kept.items()
        if revision not in contents or known.get(revision) == contents[revision]
    }
    if unknown := sorted(kept.keys() - known.keys()):
        raise NotFoundError(f"no revisions with ids {unknown}")
    write.connection.execute(
        delete(rows).where(
            rows.c.replica_id == replica, rows.c.revision_id.in_([*fresh.kept, *fresh.gone])
        )
    )
    for revision, (receipt, ok) in kept.items():
        write.connection.execute(
            insert(rows).values(
                replica_id=replica, revision_id=revision, receipt=receipt, ok=bool(ok), at=write.now
            )
        )
    write.audit(
        "replica.receipts",
        replica,
        ok=sorted(key for key, (_, ok) in kept.items() if ok),
        failed=sorted(key for key, (_, ok) in kept.items() if not ok),
        gone=list(fresh.gone),
    )


def find_receipts(connection: Connection, revisions: list[int]) -> dict[tuple[str, int], bool]:
    rows = tables.receipts
    query = select(rows.c.replica_id, rows.c.revision_id, rows.c.ok)
    found = connection.execute(query.where(rows.c.revision_id.in_(revisions)))
    return {(row.replica_id, row.revision_id): row.ok for row in found}


def find_alive(connection: Connection, now: datetime, alive_s: float) -> tuple[Replica, ...]:
    seen = _T.c.seen_at >= now - timedelta(seconds=alive_s)
    query = select(_T).where(seen).order_by(_T.c.started_at, _T.c.id)
    return tuple(_replica(row) for row in connection.execute(query))


def _find(connection: Connection, replica: str, seen: Position | None = None) -> Replica:
    query = select(_T, still_has(seen).label("follows")).where(_T.c.id == replica)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"no replica {replica!r:.100} in the registry; join again")
    if not row.follows:
        raise RestoredError(
            f"replica {replica} has seen changes that the registry has lost; nothing was changed: "
            "follow it as it is now, then join again"
        )
    return _replica(row)


def _replica(row: Row[tuple[Any, ...]]) -> Replica:
    return Replica(
        id=row.id,
        host=row.host,
        pid=row.pid,
        started_at=row.started_at,
        seen_at=row.seen_at,
        applied_version=row.applied_version,
        faults=tuple(row.faults),
    )
