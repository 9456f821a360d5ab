"""Routes of operation: rollouts, replicas, the audit, and who asks. For looking only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query

from safegene_server.access.catalog import EVERY_TENANT, Principal
from safegene_server.api import response_schemas
from safegene_server.api.dependencies import Asker, Here, whole_server
from safegene_server.api.request_schemas import LARGEST, Id, Limit, Moment
from safegene_server.api.rollout_views import shown
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import AuditEntry, Registry
from safegene_server.tenants.context import aside
from safegene_vllm.errors import NotFoundError

TENANT_ACTIONS = ("tenant.", "revision.")
SEARCHED = 1000
LAST_S = datetime.max.replace(microsecond=0, tzinfo=UTC).timestamp()

router = APIRouter(route_class=TenancyRoute)


@router.get("/rollouts", summary="List rollouts", tags=["rollouts"])
async def list_rollouts(
    tenancy: Here,
    asker: Asker,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> response_schemas.Page[response_schemas.Rollout]:
    """The newest first, each with how many of the live replicas follow it."""
    return response_schemas.Page(data=await aside(_rollouts, tenancy.registry, asker, limit))


@router.get("/rollouts/{rollout}", summary="Show a rollout", tags=["rollouts"])
async def show_rollout(rollout: Id, tenancy: Here, asker: Asker) -> response_schemas.Rollout:
    """How many of the live replicas follow it, and why the others do not yet."""
    found = shown(await aside(tenancy.registry.rollout_status, rollout), asker)
    if not found.tenants:
        raise NotFoundError(f"no rollout {rollout} in the registry")
    return found


@router.get("/replicas", summary="List live replicas", tags=["operation"])
async def list_replicas(
    tenancy: Here, asker: Asker
) -> response_schemas.Page[response_schemas.Replica]:
    """The server processes that were seen lately, and what each has applied."""
    whole_server(asker)
    found = await aside(tenancy.registry.replicas)
    return response_schemas.Page(data=[response_schemas.replica(replica) for replica in found])


@router.get("/audit", summary="Read the audit", tags=["operation"])
async def read_audit(
    tenancy: Here,
    asker: Asker,
    actor: str | None = None,
    action: Annotated[
        str | None, Query(description="may end in `.`: all of a kind", examples=["tenant."])
    ] = None,
    target: Annotated[str | None, Query(examples=["acme/support"])] = None,
    since: Moment | None = None,
    until: Moment | None = None,
    cursor: Annotated[int | None, Query(ge=1, le=LARGEST)] = None,
    limit: Limit = 100,
) -> response_schemas.Page[response_schemas.AuditEntry]:
    """The newest first. A key for some tenants reads of one of them at a time: its `target`."""
    narrow = not asker.whole_server
    if narrow and not asker.may_use((target or "").partition("@")[0]):
        raise HTTPException(403, "the key is for some tenants; name one of them as `target`.")
    page = await aside(
        tenancy.registry.audit,
        actor=actor,
        action=action,
        target=target,
        since=since,
        until=until,
        cursor=cursor,
        limit=limit,
    )
    entries = [entry for entry in page.entries if not narrow or _of_a_tenant(entry)]
    return response_schemas.Page(
        data=[response_schemas.audit_entry(e) for e in entries], cursor=page.cursor
    )


@router.get("/whoami", summary="Who asks", tags=["operation"])
async def whoami(asker: Asker) -> response_schemas.Whoami:
    """What the server knows of the key of this request."""
    expires_at = asker.expires_at
    return response_schemas.Whoami(
        name=asker.name,
        scopes=sorted(asker.scopes),
        tenants=sorted(asker.tenants),
        default_tenant=asker.default_tenant,
        base=asker.base,
        expires_at=None if expires_at is None else _moment(expires_at),
    )


def _moment(unix_s: float) -> datetime:
    """A key of the last second there is has a time that rounds to the year 10000."""
    return datetime.fromtimestamp(min(unix_s, LAST_S), UTC)


def _rollouts(registry: Registry, asker: Principal, limit: int) -> list[response_schemas.Rollout]:
    if asker.whole_server:
        found = registry.rollouts(limit=limit)
    else:
        mine = asker.tenants - {EVERY_TENANT}
        newest = registry.rollouts(limit=SEARCHED)
        found = tuple(r for r in newest if mine & set(r.tenants))[:limit]
    return [shown(registry.rollout_status(rollout.id), asker) for rollout in found]


def _of_a_tenant(entry: AuditEntry) -> bool:
    """A key or a family may be named like a tenant."""
    return entry.action.startswith(TENANT_ACTIONS)
