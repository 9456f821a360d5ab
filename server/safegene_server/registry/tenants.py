"""Tenants in the registry: who they are, what limits they have, and whether they may be changed.

Their content is revisions' business, what is served of it publishing's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, Select, insert, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database, Write
from safegene_server.registry.families import find_family
from safegene_server.registry.records import Policy, Tenant
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
        """A tenant of the family with digest `family`, with no revision yet.

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
                hint = "; the names of retired tenants stay theirs" * (known.state == "retired")
                raise ConflictError(f"tenant {name!r} exists and is {known.state}{hint}")
            _refuse_frozen_family(write.connection, family, name)
            write.connection.execute(
                insert(_T).values(
                    name=name,
                    family_digest=family,
                    source=source,
                    state="active",
                    limits=allowed,
                    created_at=write.now,
                )
            )
            version = write.bump()
            write.audit(
                "tenant.add", name, family=family, source=source, limits=allowed, version=version
            )
            return find_tenant(write.connection, name)

    def set_limits(self, name: str, limits: Mapping[str, int], *, actor: str) -> Tenant:
        """Replace a tenant's limits; what is left out has none. Errors: RegistryError."""
        allowed = validation.limits(limits)
        with self._database.write(actor) as write:
            tenant = _living(write.connection, name)
            _set(write, tenant, limits=allowed)
            version = write.bump()
            before = dict(tenant.limits)
            write.audit("tenant.limits", name, before=before, after=allowed, version=version)
            return find_tenant(write.connection, name)

    def freeze(self, name: str, *, actor: str) -> Tenant:
        """Serving goes on; what is served may not change. Nothing happens if it is frozen."""
        return self._set_state(name, "frozen", "tenant.freeze", actor)

    def unfreeze(self, name: str, *, actor: str) -> Tenant:
        """Changes are allowed again (unless the family is frozen)."""
        return self._set_state(name, "active", "tenant.unfreeze", actor)

    def _set_state(self, name: str, state: TenantState, action: str, actor: str) -> Tenant:
        with self._database.write(actor) as write:
            tenant = _living(write.connection, name)
            if tenant.state == state:
                write.unaudited()
                return tenant
            _set(write, tenant, state=state)
            write.audit(action, name, version=write.bump())
            return find_tenant(write.connection, name)

    def get(self, name: str) -> Tenant:
        """Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_tenant(connection, name)

    def list(self) -> tuple[Tenant, ...]:
        """All tenants by name, the retired ones among them."""
        query = _query().order_by(_T.c.name)
        with self._database.read() as connection:
            return tuple(_tenant(row) for row in connection.execute(query))


def living_tenants(connection: Connection) -> tuple[Tenant, ...]:
    """Those not retired, by id."""
    query = _query().where(_T.c.state != "retired").order_by(_T.c.id)
    return tuple(_tenant(row) for row in connection.execute(query))


def find_tenant(connection: Connection, name: str) -> Tenant:
    """Errors: NotFoundError."""
    found = _find(connection, name)
    if found is None:
        raise NotFoundError(f"no tenant {name!r:.200} in the registry")
    return found


def changeable_tenant(connection: Connection, name: str) -> Tenant:
    """A tenant whose revision or profile may change now.

    Errors: NotFoundError, ConflictError (retired), FrozenError.
    """
    tenant = _living(connection, name)
    if tenant.state == "frozen":
        raise FrozenError(f"tenant {name!r} is frozen; unfreeze it before it is changed")
    _refuse_frozen_family(connection, tenant.family, name)
    return tenant


def find_policy(connection: Connection, family: str) -> Policy:
    """The policy of a family; without a row there is no floor, and it is not frozen."""
    query = select(tables.policies).where(tables.policies.c.family_digest == family)
    row = connection.execute(query).one_or_none()
    return Policy(family, {}, False) if row is None else policy_of(row)


def policy_of(row: Row[tuple[Any, ...]]) -> Policy:
    floor = {int(layer): float(least) for layer, least in row.floor.items()}
    return Policy(row.family_digest, floor, row.frozen)


def retire_row(write: Write, tenant: Tenant) -> None:
    """The last state of a tenant; its name and history stay."""
    _set(write, tenant, state="retired")


def _refuse_frozen_family(connection: Connection, family: str, name: str) -> None:
    if find_policy(connection, family).frozen:
        raise FrozenError(
            f"family {family} is frozen, and tenant {name!r} with it; unfreeze the family first"
        )


def _living(connection: Connection, name: str) -> Tenant:
    tenant = find_tenant(connection, name)
    if tenant.state == "retired":
        raise ConflictError(f"tenant {name!r} is retired and changes no more; add another tenant")
    return tenant


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
    return Tenant(
        id=row.id,
        name=row.name,
        family=row.family_digest,
        source=row.source,
        state=row.state,
        limits=row.limits,
        published=row.published,
        created_at=row.created_at,
    )
