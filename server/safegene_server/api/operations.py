"""Read-only routes of operation: rollouts, replicas, the audit, and the request's own key."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query

from safegene_server.access.catalog import EVERY_TENANT, Principal
from safegene_server.api.dependencies import PrincipalDep, TenantContextDep, require_all_tenants
from safegene_server.api.request_schemas import MAX_INT, Id, Limit, Timestamp
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import AuditEntry, Registry, Rollout, RolloutStatus
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.client import schemas
from safegene_vllm.errors import NotFoundError

TENANT_ACTIONS = ("tenant.", "revision.")
SEARCHED = 1000
LAST_S = datetime.max.replace(microsecond=0, tzinfo=UTC).timestamp()

router = APIRouter(route_class=TenancyRoute)


@router.get("/rollouts", summary="List rollouts", tags=["rollouts"])
async def list_rollouts(
    tenancy: TenantContextDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> schemas.Page[schemas.Rollout]:
    """Newest first, each with how many of the live replicas follow it."""
    return schemas.Page(data=await aside(_rollouts, tenancy.registry, principal, limit))


@router.get("/rollouts/{rollout}", summary="Show a rollout", tags=["rollouts"])
async def show_rollout(
    rollout: Id, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Rollout:
    """How many of the live replicas follow it, and why the others do not yet."""
    found = rollout_view(await aside(tenancy.registry.rollouts.status, rollout), principal)
    if not found.tenants:
        raise NotFoundError(f"no rollout {rollout} in the registry")
    return found


@router.get("/replicas", summary="List live replicas", tags=["operation"])
async def list_replicas(
    tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Page[schemas.Replica]:
    """The server processes with a recent heartbeat, and the version each has applied."""
    require_all_tenants(principal)
    found = await aside(tenancy.registry.replicas.list)
    return schemas.Page(data=[schemas.Replica.model_validate(replica) for replica in found])


@router.get("/audit", summary="Read the audit", tags=["operation"])
async def read_audit(
    tenancy: TenantContextDep,
    principal: PrincipalDep,
    actor: str | None = None,
    action: Annotated[
        str | None, Query(description="may end in `.`: all of a kind", examples=["tenant."])
    ] = None,
    target: Annotated[str | None, Query(examples=["acme/support"])] = None,
    since: Timestamp | None = None,
    until: Timestamp | None = None,
    cursor: Annotated[int | None, Query(ge=1, le=MAX_INT)] = None,
    limit: Limit = 100,
) -> schemas.Page[schemas.AuditEntry]:
    """Newest first. A key for some tenants reads of one of them at a time: its `target`."""
    narrow = not principal.whole_server
    if narrow and not principal.may_use((target or "").partition("@")[0]):
        raise HTTPException(403, "the key is for some tenants; name one of them as `target`.")
    page = await aside(
        tenancy.registry.audit.page,
        actor=actor,
        action=action,
        target=target,
        since=since,
        until=until,
        cursor=cursor,
        limit=limit,
    )
    entries = [entry for entry in page.entries if not narrow or _of_a_tenant(entry)]
    return schemas.Page(
        data=[schemas.AuditEntry.model_validate(entry) for entry in entries], cursor=page.cursor
    )


@router.get("/whoami", summary="Show the request's own key", tags=["operation"])
async def whoami(principal: PrincipalDep) -> schemas.Whoami:
    """Its name, scopes and tenants."""
    expires_at = principal.expires_at
    return schemas.Whoami(
        name=principal.name,
        scopes=sorted(principal.scopes),
        tenants=sorted(principal.tenants),
        default_tenant=principal.default_tenant,
        base=principal.base,
        # A key of the last representable second has a time that rounds to the year 10000.
        expires_at=None
        if expires_at is None
        else datetime.fromtimestamp(min(expires_at, LAST_S), UTC),
    )


def _rollouts(registry: Registry, principal: Principal, limit: int) -> list[schemas.Rollout]:
    if principal.whole_server:
        found = registry.rollouts.list(limit=limit)
    else:
        own = principal.tenants - {EVERY_TENANT}
        newest = registry.rollouts.list(limit=SEARCHED)
        found = tuple(r for r in newest if own & set(r.tenants))[:limit]
    return [rollout_view(registry.rollouts.status(rollout.id), principal) for rollout in found]


def _of_a_tenant(entry: AuditEntry) -> bool:
    """Return whether the target is a tenant: a key or a family may have the same name."""
    return entry.action.startswith(TENANT_ACTIONS)


def rollout_view(status: RolloutStatus, principal: Principal) -> schemas.Rollout:
    """Return a rollout with those of its tenants and revisions that the key may see."""
    rollout = status.rollout
    return schemas.Rollout(
        id=rollout.id,
        kind=rollout.kind,
        tenants=[name for name in rollout.tenants if principal.may_use(name)],
        revisions=[r.served_name for r in status.revisions if principal.may_use(r.tenant)],
        applied=status.applied,
        live=status.live,
        done=status.done,
        lagging=[
            schemas.Lagging(replica=lag.replica.id, reason=_reason(lag.reason, principal))
            for lag in status.lagging
        ],
        created_at=rollout.created_at,
        created_by=rollout.created_by,
    )


def _reason(reason: str, principal: Principal) -> str:
    """Hide a replica's own reason, which may name other tenants, from keys for some tenants."""
    return reason if principal.whole_server else "has not applied this rollout yet"


async def rollout_view_or_none(
    tenancy: TenantContext, rollout: Rollout | None, principal: Principal
) -> schemas.Rollout | None:
    """Return the view of a rollout as it is now; None for none."""
    if rollout is None:
        return None
    return rollout_view(await aside(tenancy.registry.rollouts.status, rollout.id), principal)
