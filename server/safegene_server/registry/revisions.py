"""Revisions: immutable content of tenants, numbered from 1, and its state before publication.

Publication is in rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write
from safegene_server.registry.families import find_family
from safegene_server.registry.records import Identity, Policy, Revision, Tenant, from_row
from safegene_server.registry.tenants import changeable_tenant, find_policy, find_tenant
from safegene_vllm.client.schemas import RevisionState
from safegene_vllm.errors import BoundsError, ConflictError, NotFoundError
from safegene_vllm.formats.profile import Profile, check_profile, parse_profile, profile_json

_T = tables.revisions

TRANSITIONS: Mapping[str, frozenset[str]] = {
    "registered": frozenset({"checking", "failed", "ready"}),
    "checking": frozenset({"registered", "failed", "ready"}),
    "failed": frozenset({"checking"}),
    "ready": frozenset({"checking", "failed"}),
}
"""Allowed changes of a revision's state before publication; rollouts makes those after it."""


class Revisions:
    """Revisions of tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        tenant: str,
        profile: Profile,
        *,
        actor: str,
        adapter_digest: str | None = None,
        source: str | None = None,
        expected: int | None = None,
    ) -> Revision:
        """Add content of a tenant under the next number, without publishing it.

        `adapter_digest=None` is a profile on the base. `source` is where other replicas fetch the
        adapter (None: the tenant's own source). `expected` is the number that must be published
        now (0: none). Errors: RegistryError, NotFoundError, FrozenError; ConflictError naming both
        numbers; FamilyMismatchError, BoundsError (the family's own bounds, or below the floor).
        """
        if adapter_digest is not None:
            validation.digest(adapter_digest, "adapter_digest")
        if source is not None:
            validation.line(source, "source", 4000)
        with self._database.write(actor) as write:
            owner = changeable_tenant(write.connection, tenant)
            check_expected(owner, expected)
            check_profile(profile, find_family(write.connection, owner.family).header)
            check_floor(profile, find_policy(write.connection, owner.family), f"tenant {tenant!r}")
            if adapter_digest is None:
                source = None
            elif source is None:
                source = owner.source
            return new_revision(write, owner, adapter_digest, profile, source=source)

    def set_state(
        self,
        revision: int,
        state: RevisionState,
        *,
        actor: str,
        reasons: Iterable[str] = (),
        gate: Mapping[str, Any] | None = None,
        checked: Identity | None = None,
    ) -> Revision:
        """Record the result of a check: `state` and its reasons; `gate=None` leaves the gate's.

        `checked` is the content that was checked. Errors: NotFoundError; ConflictError for a change
        of state that a check may not make, or if the revision's content is not `checked`.
        """
        with self._database.write(actor) as write:
            found = find_revision_by_id(write.connection, revision)
            check_identity(found, checked)
            return change_state(write, found, state, reasons=reasons, gate=gate)

    def get(self, tenant: str, number: int) -> Revision:
        """Return `tenant@number`. Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_revision(connection, find_tenant(connection, tenant), number)

    def get_by_id(self, revision: int) -> Revision:
        """Return the revision with this id. Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_revision_by_id(connection, revision)

    def published(self, tenant: str) -> tuple[Tenant, Revision | None]:
        """Return a tenant and its published revision in one read. Errors: NotFoundError."""
        with self._database.read() as connection:
            owner = find_tenant(connection, tenant)
            if owner.published is None:
                return owner, None
            return owner, find_revision(connection, owner, owner.published)

    def list(self, tenant: str) -> tuple[Revision, ...]:
        """Return all revisions of a tenant by number. Errors: NotFoundError."""
        with self._database.read() as connection:
            owner = find_tenant(connection, tenant)
            query = revision_query().where(_T.c.tenant_id == owner.id).order_by(_T.c.number)
            return tuple(revision_of(row) for row in connection.execute(query))


def new_revision(
    write: Write,
    tenant: Tenant,
    adapter_digest: str | None,
    profile: Profile,
    *,
    source: str | None,
    state: RevisionState = "registered",
    gate: Mapping[str, Any] | None = None,
) -> Revision:
    """Insert a revision under the next number. `write` must be exclusive."""
    last = select(func.coalesce(func.max(_T.c.number), 0)).where(_T.c.tenant_id == tenant.id)
    number = write.connection.execute(last).scalar_one() + 1
    raw = profile_json(profile)
    added = write.insert(
        _T,
        tenant_id=tenant.id,
        number=number,
        kind="profile" if adapter_digest is None else "adapter",
        adapter_digest=adapter_digest,
        profile_digest=raw["digest"],
        profile=raw,
        source=source,
        state=state,
        reasons=[],
        gate=dict(gate or {}),
        created_at=write.now,
        created_by=write.actor,
    )
    write.audit(
        "revision.add",
        validation.served_name(tenant.name, number),
        id=added,
        adapter=adapter_digest,
        profile=raw["digest"],
        source=source,
    )
    return find_revision_by_id(write.connection, added)


def change_state(
    write: Write,
    found: Revision,
    state: RevisionState,
    *,
    reasons: Iterable[str] = (),
    gate: Mapping[str, Any] | None = None,
) -> Revision:
    """Change a revision's state before publication. Errors: ConflictError, RegistryError."""
    if state not in TRANSITIONS.get(found.state, ()):
        allowed = ", ".join(sorted(TRANSITIONS.get(found.state, ()))) or "no other state"
        raise ConflictError(
            f"{found.served_name} is {found.state} and cannot become {state}; from there "
            f"a check leads to {allowed}"
        )
    values: dict[str, Any] = {"state": state, "reasons": [str(reason) for reason in reasons]}
    if gate is not None:
        values["gate"] = validation.plain(gate, "gate")
    write.connection.execute(update(_T).where(_T.c.id == found.id).values(**values))
    write.audit(
        f"revision.{state}", found.served_name, before=found.state, reasons=values["reasons"]
    )
    return find_revision_by_id(write.connection, found.id)


def check_expected(tenant: Tenant, expected: int | None) -> None:
    """Check that `expected` is published (0: none, None: any). Errors: ConflictError."""
    if expected is not None and expected != (tenant.published or 0):
        published = tenant.served or "nothing"
        wanted = validation.served_name(tenant.name, expected) if expected else "nothing"
        raise ConflictError(
            f"tenant {tenant.name!r} serves {published}, expected {wanted}: it was changed "
            "meanwhile; read it again and retry"
        )


def check_identity(found: Revision, checked: Identity | None) -> None:
    """Check that a restored registry has not replaced `checked`. Errors: ConflictError."""
    if checked is not None and found.identity != checked:
        raise ConflictError(
            f"{checked.name} (id {checked.id}, adapter {checked.adapter}, profile "
            f"{checked.profile}) was checked, but in the registry {found.served_name} has adapter "
            f"{found.adapter_digest} and profile {found.profile.digest}: the registry was restored "
            "meanwhile; start again"
        )


def check_floor(profile: Profile, policy: Policy, what: str) -> None:
    """Check coefficients against the family's floor. Errors: BoundsError naming every layer."""
    below = [
        f"layer {layer} has {profile.coefficients[layer]}, the floor is {minimum}"
        for layer, minimum in sorted(policy.floor.items())
        if profile.coefficients[layer] < minimum
    ]
    if below:
        raise BoundsError(
            f"{what} is below the floor of its family: {'; '.join(below)}; raise the coefficients "
            "in a new revision, or lower the floor"
        )


def find_revision(connection: Connection, tenant: Tenant, number: int) -> Revision:
    """Read a revision by tenant and number. Errors: NotFoundError."""
    validation.revision_number(number)
    query = revision_query().where(_T.c.tenant_id == tenant.id, _T.c.number == number)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"tenant {tenant.name!r} has no revision {number}")
    return revision_of(row)


def find_revision_by_id(connection: Connection, revision: int) -> Revision:
    """Read a revision by id. Errors: NotFoundError."""
    row = connection.execute(revision_query().where(_T.c.id == revision)).one_or_none()
    if row is None:
        raise NotFoundError(f"no revision with id {revision!r:.40} in the registry")
    return revision_of(row)


def find_revisions(connection: Connection, revisions: Sequence[int]) -> tuple[Revision, ...]:
    """Read revisions by id, in the given order; unknown ids are left out."""
    rows = connection.execute(revision_query().where(_T.c.id.in_(revisions)))
    found = {row.id: revision_of(row) for row in rows}
    return tuple(found[number] for number in revisions if number in found)


def find_identities(connection: Connection, revisions: Sequence[int]) -> dict[int, Identity]:
    """Read identities by id without their profiles; unknown ids are left out."""
    owner = tables.tenants
    query = select(
        _T.c.id,
        owner.c.name,
        _T.c.number,
        owner.c.family_digest,
        _T.c.adapter_digest,
        _T.c.profile_digest,
    ).join(owner, owner.c.id == _T.c.tenant_id)
    return {
        row.id: Identity(
            id=row.id,
            name=validation.served_name(row.name, row.number),
            family=row.family_digest,
            adapter=row.adapter_digest,
            profile=row.profile_digest,
        )
        for row in connection.execute(query.where(_T.c.id.in_(revisions)))
    }


def revision_query() -> Select[tuple[Any, ...]]:
    owner = tables.tenants
    return select(_T, owner.c.name.label("tenant")).join(owner, owner.c.id == _T.c.tenant_id)


def revision_of(row: Row[tuple[Any, ...]]) -> Revision:
    """Make the record of a row. Errors: FormatError if the profile was altered in the database."""
    where = f"registry, revision {validation.served_name(row.tenant, row.number)}"
    return from_row(Revision, row, profile=parse_profile(row.profile, where))
