"""Rollouts: publication, rollback and retirement of tenants, one transaction each.

Replicas follow every rollout. The order of publications is recorded: a rollback publishes the one
before the current one, the next rollback the one before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, delete, func, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write, clock
from safegene_server.registry.records import (
    Identity,
    Lag,
    Replica,
    Revision,
    Rollout,
    RolloutStatus,
    Tenant,
    from_row,
)
from safegene_server.registry.replicas import ALIVE_S, find_alive, find_receipts
from safegene_server.registry.revisions import (
    change_state,
    check_expected,
    check_floor,
    check_identity,
    find_revision,
    find_revision_by_id,
    find_revisions,
)
from safegene_server.registry.tenants import changeable_tenant, find_policy, retire_row
from safegene_vllm.client.schemas import RolloutKind
from safegene_vllm.errors import ConflictError, NotFoundError

_P = tables.publications


class Rollouts:
    """Rollouts of the registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def publish(
        self,
        tenant: str,
        number: int,
        *,
        actor: str,
        expected: int | None = None,
        gate: Mapping[str, Any] | None = None,
        checked: Identity | None = None,
    ) -> Rollout:
        """Point the alias `tenant` to `tenant@number`; the revision before it is superseded.

        `expected` is the number that must be published now (0: none). With `gate`, the result of
        a new revision's smoke test, the revision becomes ready in the same transaction. `checked`
        is the content that must be published. Errors: RegistryError, NotFoundError, FrozenError;
        ConflictError (not `expected`, not `checked`, or not ready); BoundsError (below the floor).
        """
        with self._database.write(actor) as write:
            owner = changeable_tenant(write.connection, tenant)
            check_expected(owner, expected)
            revision = find_revision(write.connection, owner, number)
            check_identity(revision, checked)
            if gate is not None:
                revision = change_state(write, revision, "ready", gate=gate)
            if revision.state not in ("ready", "superseded"):
                why = f" ({'; '.join(revision.reasons)})" if revision.reasons else ""
                raise ConflictError(
                    f"{revision.served_name} is {revision.state}{why}; only a revision that is "
                    "ready, or was published before, can be published"
                )
            _check_floor(write.connection, owner, revision)
            return switch(write, "publish", [(owner, revision)])

    def rollback(
        self,
        tenant: str,
        number: int | None = None,
        *,
        actor: str,
        expected: int | None = None,
        checked: Identity | None = None,
    ) -> Rollout:
        """Publish the revision before the current one again, or an earlier one by `number`.

        `checked` is the content that must be published. Errors: as for `publish`; ConflictError if
        nothing was published before.
        """
        if number is not None:
            validation.revision_number(number)
        with self._database.write(actor) as write:
            owner = changeable_tenant(write.connection, tenant)
            check_expected(owner, expected)
            undone, target = _steps_back(write.connection, owner, number)
            revision = find_revision_by_id(write.connection, target)
            check_identity(revision, checked)
            _check_floor(write.connection, owner, revision)
            write.connection.execute(update(_P).where(_P.c.id.in_(undone)).values(undone=True))
            return switch(write, "rollback", [(owner, revision)])

    def retire(self, tenant: str, *, actor: str, expected: int | None = None) -> Rollout:
        """Stop serving a tenant for good; its history and its name stay.

        Errors: NotFoundError, FrozenError, ConflictError.
        """
        with self._database.write(actor) as write:
            owner = changeable_tenant(write.connection, tenant)
            check_expected(owner, expected)
            retire_row(write, owner)
            return switch(write, "retire", [(owner, None)])

    def list(self, *, limit: int = 50) -> tuple[Rollout, ...]:
        """Return rollouts, newest first."""
        rows = tables.rollouts
        query = select(rows).order_by(rows.c.id.desc()).limit(limit)
        with self._database.read() as connection:
            return tuple(from_row(Rollout, row) for row in connection.execute(query))

    def status(self, rollout: int, *, alive_s: float = ALIVE_S) -> RolloutStatus:
        """Count the live replicas that follow a rollout, and say why the others do not.

        A replica follows once it has applied the rollout's version and has a good receipt for each
        of its revisions that is still published. Errors: NotFoundError.
        """
        with self._database.read() as connection:
            found = find_rollout(connection, rollout)
            version = connection.execute(select(tables.version.c.value)).scalar_one()
            alive = find_alive(connection, clock(connection), alive_s)
            revisions = find_revisions(connection, found.revisions)
            # Revisions that are not published now belong to a later rollout.
            wanted = {r.id: r.served_name for r in revisions if r.state == "published"}
            receipts = find_receipts(connection, [*wanted])
        lagging = [
            Lag(replica, reason)
            for replica in alive
            if (reason := _lag_reason(replica, found, version, wanted, receipts))
        ]
        applied = len(alive) - len(lagging)
        return RolloutStatus(found, revisions, applied, len(alive), tuple(lagging))


def switch(
    write: Write, kind: RolloutKind, changes: Sequence[tuple[Tenant, Revision | None]]
) -> Rollout:
    """Publish each tenant's revision (None: retire it) as one rollout under one version."""
    version = write.bump()
    rollout = write.insert(
        tables.rollouts,
        kind=kind,
        tenants=[tenant.name for tenant, _ in changes],
        revisions=[revision.id for _, revision in changes if revision is not None],
        version=version,
        created_at=write.now,
        created_by=write.actor,
    )
    for tenant, revision in changes:
        _set_alias(write, tenant, revision)
        if revision is not None and kind != "rollback":
            write.insert(
                _P, tenant_id=tenant.id, revision_id=revision.id, rollout_id=rollout, undone=False
            )
        write.audit(
            f"tenant.{kind}",
            tenant.name if revision is None else revision.served_name,
            before=tenant.published,
            rollout=rollout,
            version=version,
        )
    return find_rollout(write.connection, rollout)


def previous_ids() -> Select[tuple[int]]:
    """Select the revision that a rollback would publish, for every tenant that has one."""
    rank = func.row_number().over(partition_by=_P.c.tenant_id, order_by=_P.c.id.desc())
    ranked = select(_P.c.revision_id, rank.label("rank")).where(_P.c.undone.is_(False)).subquery()
    return select(ranked.c.revision_id).where(ranked.c.rank == 2)


def find_rollout(connection: Connection, rollout: int) -> Rollout:
    """Read a rollout. Errors: NotFoundError."""
    query = select(tables.rollouts).where(tables.rollouts.c.id == rollout)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"no rollout {rollout!r:.40} in the registry")
    return from_row(Rollout, row)


def _set_alias(write: Write, tenant: Tenant, revision: Revision | None) -> None:
    """Set the alias and the states of both revisions."""
    alias, states = tables.aliases, tables.revisions
    leaving = "retired" if revision is None else "superseded"
    write.connection.execute(
        update(states)
        .where(states.c.tenant_id == tenant.id, states.c.state == "published")
        .values(state=leaving)
    )
    write.connection.execute(delete(alias).where(alias.c.tenant_id == tenant.id))
    if revision is not None:
        write.insert(alias, tenant_id=tenant.id, revision_id=revision.id, since=write.now)
        write.connection.execute(
            update(states).where(states.c.id == revision.id).values(state="published")
        )


def _check_floor(connection: Connection, tenant: Tenant, revision: Revision) -> None:
    check_floor(revision.profile, find_policy(connection, tenant.family), revision.served_name)


def _lag_reason(
    replica: Replica,
    rollout: Rollout,
    version: int,
    wanted: Mapping[int, str],
    receipts: Mapping[tuple[str, int], bool],
) -> str | None:
    """Return why the replica does not follow, None if it does."""
    reasons = []
    if replica.applied_version < rollout.version:
        reasons.append(f"is at version {replica.applied_version}, needs {rollout.version}")
    elif replica.applied_version > version:
        reasons.append(
            f"is at version {replica.applied_version} of the registry before it was restored, "
            f"which is at {version} now"
        )
    for revision, name in wanted.items():
        ok = receipts.get((replica.id, revision))
        if ok is None:
            reasons.append(f"has no receipt for {name}")
        elif not ok:
            reasons.append(f"has a receipt for {name} that differs from its files")
    if reasons:
        reasons += replica.faults
    return "; ".join(reasons) or None


def _steps_back(
    connection: Connection, tenant: Tenant, number: int | None
) -> tuple[list[int], int]:
    """Return the publications to undo, and the revision that is the newest without them."""
    numbers = tables.revisions
    rows = connection.execute(
        select(_P.c.id, _P.c.revision_id, numbers.c.number)
        .join(numbers, numbers.c.id == _P.c.revision_id)
        .where(_P.c.tenant_id == tenant.id, _P.c.undone.is_(False))
        .order_by(_P.c.id.desc())
    ).all()
    if tenant.published is None or len(rows) < 2:
        raise ConflictError(
            f"tenant {tenant.name!r} has no publication before the current one; there is nothing "
            "to roll back to"
        )
    undone = [rows[0].id]
    for row in rows[1:]:
        if number is None or row.number == number:
            return undone, row.revision_id
        undone.append(row.id)
    before = ", ".join(str(row.number) for row in rows[1:])
    raise NotFoundError(
        f"{validation.served_name(tenant.name, number or 0)} was not published "
        f"before the current revision ({before} were); publish it instead"
    )
