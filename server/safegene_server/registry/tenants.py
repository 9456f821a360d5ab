"""Tenants in the registry: name, family, limits and state.

Content of tenants is in revisions, what is served of it in rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, Select, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write
from safegene_server.registry.families import find_family
from safegene_server.registry.records import Policy, Tenant, from_row
from safegene_vllm.client.schemas import TenantState
from safegene_vllm.errors import ConflictError, FrozenError, NotFoundError

_T = tables.tenants


class Tenants:
    """Tenants of the registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        name: str,
        family: str,
        *,
        actor: str,
        source: str | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Tenant:
        """Add a tenant of the family with digest `family`, without a revision.

        Errors: RegistryError, NotFoundError; ConflictError if the name is or was in use;
        FrozenError if the family is frozen.
        """
        validation.tenant_name(name)
        allowed = validation.limits(limits or {})
        if source is not None:
            validation.line(source, "source", 4000)
        with self._database.write(actor) as write:
            find_family(write.connection, family)
            known = _find(write.connection, name)
            if known is not None:
                raise _taken(known)
            _check_family_not_frozen(write.connection, family, name)
            write.insert(
                _T,
                name=name,
                family_digest=family,
                source=source,
                state="active",
                limits=allowed,
                created_at=write.now,
            )
            version = write.bump()
            write.audit(
                "tenant.add", name, family=family, source=source, limits=allowed, version=version
            )
            return find_tenant(write.connection, name)

    def restart(
        self,
        name: str,
        family: str,
        *,
        actor: str,
        source: str | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Tenant:
        """Give a tenant that never served anything another source and limits, retired or not.

        Its failed revisions and jobs stay in its history.
        Errors: NotFoundError; ConflictError if it was served, is of another family or has a job in
        progress; FrozenError; RegistryError.
        """
        allowed = validation.limits(limits or {})
        if source is not None:
            validation.line(source, "source", 4000)
        with self._database.write(actor) as write:
            tenant = find_tenant(write.connection, name)
            served = tables.publications.c.tenant_id == tenant.id
            if write.connection.execute(select(tables.publications.c.id).where(served)).first():
                raise _taken(tenant)
            if tenant.state == "frozen":
                raise FrozenError(f"tenant {name!r} is frozen; unfreeze it before you change it")
            _check_family_not_frozen(write.connection, family, name)
            if tenant.family != family:
                raise ConflictError(
                    f"tenant {name!r} exists for family {tenant.family}, not {family}; choose "
                    "another name"
                )
            live = tables.jobs.c.state.in_(("queued", "running"))
            query = select(tables.jobs.c.id).where(live, tables.jobs.c.tenant_id == tenant.id)
            if job := write.connection.execute(query).first():
                raise ConflictError(
                    f"tenant {name!r} exists, and job {job.id} is in progress for it; wait for the "
                    "job or cancel it"
                )
            _set(write, tenant, source=source, limits=allowed, state="active")
            write.audit("tenant.restart", name, source=source, limits=allowed, version=write.bump())
            return find_tenant(write.connection, name)

    def set_limits(self, name: str, limits: Mapping[str, int], *, actor: str) -> Tenant:
        """Replace all limits of a tenant; one left out is unlimited. Errors: RegistryError."""
        allowed = validation.limits(limits)
        with self._database.write(actor) as write:
            tenant = _find_current(write.connection, name)
            _set(write, tenant, limits=allowed)
            version = write.bump()
            before = dict(tenant.limits)
            write.audit("tenant.limits", name, before=before, after=allowed, version=version)
            return find_tenant(write.connection, name)

    def freeze(self, name: str, *, actor: str) -> Tenant:
        """Reject changes of a tenant's content, while it is served as before. Idempotent."""
        return self._set_state(name, "frozen", "tenant.freeze", actor)

    def unfreeze(self, name: str, *, actor: str) -> Tenant:
        """Allow changes again, unless the family is frozen. Idempotent."""
        return self._set_state(name, "active", "tenant.unfreeze", actor)

    def _set_state(self, name: str, state: TenantState, action: str, actor: str) -> Tenant:
        with self._database.write(actor) as write:
            tenant = _find_current(write.connection, name)
            if tenant.state == state:
                write.skip_audit()
                return tenant
            _set(write, tenant, state=state)
            write.audit(action, name, version=write.bump())
            return find_tenant(write.connection, name)

    def get(self, name: str) -> Tenant:
        """Return a tenant. Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_tenant(connection, name)

    def list(self) -> tuple[Tenant, ...]:
        """Return all tenants by name, including retired ones."""
        query = _query().order_by(_T.c.name)
        with self._database.read() as connection:
            return tuple(_tenant(row) for row in connection.execute(query))


def current_tenants(connection: Connection) -> tuple[Tenant, ...]:
    """Read the tenants that are not retired, by id."""
    query = _query().where(_T.c.state != "retired").order_by(_T.c.id)
    return tuple(_tenant(row) for row in connection.execute(query))


def find_tenant(connection: Connection, name: str) -> Tenant:
    """Read a tenant. Errors: NotFoundError."""
    found = _find(connection, name)
    if found is None:
        raise NotFoundError(f"no tenant {name!r:.200} in the registry")
    return found


def changeable_tenant(connection: Connection, name: str) -> Tenant:
    """Read a tenant, if its content may be changed now.

    Errors: NotFoundError, ConflictError (retired), FrozenError.
    """
    tenant = _find_current(connection, name)
    if tenant.state == "frozen":
        raise FrozenError(f"tenant {name!r} is frozen; unfreeze it before you change it")
    _check_family_not_frozen(connection, tenant.family, name)
    return tenant


def find_policy(connection: Connection, family: str) -> Policy:
    """Read a family's policy; without a row it has no floor and is not frozen."""
    query = select(tables.policies).where(tables.policies.c.family_digest == family)
    row = connection.execute(query).one_or_none()
    if row is None:
        return Policy(family, {}, False)
    floor = {int(layer): float(minimum) for layer, minimum in row.floor.items()}
    return Policy(family, floor, row.frozen)


def retire_row(write: Write, tenant: Tenant) -> None:
    """Set the final state of a tenant; its name and history stay."""
    _set(write, tenant, state="retired")


def _check_family_not_frozen(connection: Connection, family: str, name: str) -> None:
    if find_policy(connection, family).frozen:
        raise FrozenError(
            f"family {family} is frozen, and tenant {name!r} with it; unfreeze the family first"
        )


def _find_current(connection: Connection, name: str) -> Tenant:
    tenant = find_tenant(connection, name)
    if tenant.state == "retired":
        raise ConflictError(f"tenant {name!r} is retired and cannot be changed; add another tenant")
    return tenant


def _taken(tenant: Tenant) -> ConflictError:
    hint = "; names of retired tenants cannot be reused" * (tenant.state == "retired")
    return ConflictError(f"tenant {tenant.name!r} exists and is {tenant.state}{hint}")


def _set(write: Write, tenant: Tenant, **values: Any) -> None:
    write.connection.execute(update(_T).where(_T.c.id == tenant.id).values(**values))


def _query() -> Select[tuple[Any, ...]]:
    alias, revision = tables.aliases, tables.revisions
    return select(_T, revision.c.number.label("published")).select_from(
        _T.outerjoin(alias, alias.c.tenant_id == _T.c.id).outerjoin(
            revision, revision.c.id == alias.c.revision_id
        )
    )


def _find(connection: Connection, name: str) -> Tenant | None:
    row = connection.execute(_query().where(_T.c.name == name)).one_or_none()
    return None if row is None else _tenant(row)


def _tenant(row: Row[tuple[Any, ...]]) -> Tenant:
    return from_row(Tenant, row, family=row.family_digest)
