"""Routes of tenants: register, show, change, roll back, freeze, limit, retire.

A tenant's name may contain a slash, so routes with a word after the name are matched first, and
those words are reserved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException

from safegene_server import calibration
from safegene_server.access.catalog import Principal
from safegene_server.api import request_schemas
from safegene_server.api.dependencies import (
    PrincipalDep,
    TenantContextDep,
    require_tenant_access,
)
from safegene_server.api.operations import rollout_view, rollout_view_or_none
from safegene_server.api.request_schemas import ExpectedQuery, TenantName
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import Tenant
from safegene_server.tenants import TenantContext, service
from safegene_server.tenants.context import aside
from safegene_server.tenants.service import Published
from safegene_vllm.client import schemas
from safegene_vllm.errors import ConflictError, RegistryError

MAX_QUEUED = 4
"""Maximum number of queued jobs of one tenant: they run one at a time, for all tenants in turn."""
RESERVED = frozenset(
    {
        *("calibrate", "freeze", "limits", "probe", "profile", "publish", "revisions"),
        *("rollback", "unfreeze"),
    }
)
"""Words that may follow a tenant's name in a path."""

router = APIRouter(route_class=TenancyRoute, tags=["tenants"])


@router.post("/tenants", status_code=202, summary="Register a tenant")
async def register(
    body: request_schemas.Register, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Onboarding:
    """The returned job fetches, checks, smoke-tests and publishes its content.

    With `calibrate`, that job finds its coefficients first, on this engine. The same request again
    returns the same tenant and job.
    """
    second = body.name.partition("/")[2]
    if second in RESERVED:
        raise RegistryError(
            f"tenant name {body.name!r}: its second part may not be one of "
            f"{', '.join(sorted(RESERVED))}, which are words of this API"
        )
    name = require_tenant_access(principal, body.name)
    _check_source(tenancy, principal, name, body.source)
    given: dict[str, Any] = {
        "source": body.source,
        "first": body.first(),
        "limits": body.limits.given(),
        "publish": body.publish,
        "actor": principal.name,
    }
    if body.calibrate is None:
        tenant, job = await service.register(tenancy, name, **given)
    else:
        tenant, job = await calibration.register(tenancy, name, body.calibrate.request(), **given)
    return schemas.Onboarding.model_validate({"tenant": tenant, "job": job})


@router.get("/tenants", summary="List tenants")
async def list_tenants(
    tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Page[schemas.Tenant]:
    """Those of the key, by name, retired ones included."""
    found = await aside(tenancy.registry.tenants.list)
    views = [await _view(tenancy, tenant) for tenant in found if principal.may_use(tenant.name)]
    return schemas.Page(data=views)


@router.post("/tenants/{name:path}/revisions", status_code=202, summary="Add a revision")
async def add_revision(
    name: TenantName,
    body: request_schemas.NewRevision,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
) -> schemas.Onboarding:
    """The returned job fetches new content and publishes it.

    The tenant's served revision stays until that job publishes, and if it fails.
    """
    name = require_tenant_access(principal, name)
    _check_source(tenancy, principal, name, body.source)
    given: dict[str, Any] = {
        "source": body.source,
        "first": body.first(),
        "publish": body.publish,
        "expected": body.expected_revision,
        "actor": principal.name,
    }
    await _check_queue(tenancy, name)
    if body.calibrate is None:
        job = await service.add_revision(tenancy, name, **given)
    else:
        job = await calibration.add_revision(tenancy, name, body.calibrate.request(), **given)
    tenant = await aside(tenancy.registry.tenants.get, name)
    return schemas.Onboarding.model_validate({"tenant": tenant, "job": job})


@router.get("/tenants/{name:path}/revisions", summary="List a tenant's revisions")
async def list_revisions(
    name: TenantName, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Page[schemas.Revision]:
    """All of them by number, with the result of the smoke test and why some failed."""
    name = require_tenant_access(principal, name)
    found = await aside(tenancy.registry.revisions.list, name)
    return schemas.Page(data=[schemas.Revision.model_validate(revision) for revision in found])


@router.post("/tenants/{name:path}/calibrate", status_code=202, summary="Calibrate a tenant")
async def calibrate(
    name: TenantName,
    body: request_schemas.Calibrate,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
) -> schemas.Onboarding:
    """The returned job searches better coefficients for the served adapter, on this engine.

    They are published if they are better on the held-out examples; if not, the job says so and
    nothing changes.
    """
    name = require_tenant_access(principal, name)
    await _check_queue(tenancy, name)
    job = await calibration.start(
        tenancy,
        name,
        body.request(),
        publish=body.publish,
        expected=body.expected_revision,
        actor=principal.name,
    )
    tenant = await aside(tenancy.registry.tenants.get, name)
    return schemas.Onboarding.model_validate({"tenant": tenant, "job": job})


@router.patch("/tenants/{name:path}/profile", summary="Change coefficients")
async def change_profile(
    name: TenantName,
    body: request_schemas.ChangeProfile,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
) -> schemas.Switched:
    """A new revision of the same adapter, served here when this responds.

    Requests in flight finish on the revision that they started with. Nothing happens if the
    coefficients are unchanged. `rollout` counts the servers that have reported, which this one
    does shortly after it has responded.
    """
    done = await service.change_profile(
        tenancy,
        require_tenant_access(principal, name),
        body.change(),
        expected=body.expected_revision,
        actor=principal.name,
    )
    return _switched(done, principal)


@router.post("/tenants/{name:path}/publish", summary="Publish a revision")
async def publish(
    name: TenantName,
    body: request_schemas.Publish,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
) -> schemas.Switched:
    """A revision that is ready, or was served before."""
    done = await service.publish(
        tenancy,
        require_tenant_access(principal, name),
        body.number,
        expected=body.expected_revision,
        actor=principal.name,
    )
    return _switched(done, principal)


@router.post("/tenants/{name:path}/rollback", summary="Return to an earlier revision")
async def roll_back(
    name: TenantName,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
    body: request_schemas.Rollback | None = None,
) -> schemas.Switched:
    """The one served before, or with `number` an earlier one. Repeated: one further back.

    With `expected_revision`, a request that is sent twice rolls back once.
    """
    body = body or request_schemas.Rollback()
    done = await service.roll_back(
        tenancy,
        require_tenant_access(principal, name),
        body.number,
        expected=body.expected_revision,
        actor=principal.name,
    )
    return _switched(done, principal)


@router.post("/tenants/{name:path}/freeze", summary="Freeze a tenant")
async def freeze(
    name: TenantName, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Tenant:
    """Serving continues; what is served may not change until it is unfrozen."""
    return await _set_frozen(tenancy, principal, name, True)


@router.post("/tenants/{name:path}/unfreeze", summary="Unfreeze a tenant")
async def unfreeze(
    name: TenantName, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Tenant:
    """It may change again, unless its family is frozen."""
    return await _set_frozen(tenancy, principal, name, False)


@router.put("/tenants/{name:path}/limits", summary="Set a tenant's limits")
async def set_limits(
    name: TenantName,
    body: request_schemas.Limits,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
) -> schemas.Tenant:
    """All of them: one that is left out is unlimited. They are counted per server process."""
    name = require_tenant_access(principal, name)
    tenant = await service.set_limits(tenancy, name, body.given(), actor=principal.name)
    return schemas.Tenant.model_validate(tenant)


@router.get("/tenants/{name:path}", summary="Show a tenant")
async def show_tenant(
    name: TenantName, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Tenant:
    """Its source, state, limits and served revision."""
    name = require_tenant_access(principal, name)
    return await _view(tenancy, await aside(tenancy.registry.tenants.get, name))


@router.delete("/tenants/{name:path}", summary="Retire a tenant")
async def retire(
    name: TenantName,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
    expected_revision: ExpectedQuery = None,
) -> schemas.Retired:
    """It is never served again, and its jobs are cancelled. Its name and history stay."""
    name = require_tenant_access(principal, name)
    tenant, rollout = await service.retire(
        tenancy, name, expected=expected_revision, actor=principal.name
    )
    view = await rollout_view_or_none(tenancy, rollout, principal)
    return schemas.Retired.model_validate({"tenant": tenant, "rollout": view})


async def _view(tenancy: TenantContext, tenant: Tenant) -> schemas.Tenant:
    """Return a tenant, with the reason if it serves nothing because its last job failed."""
    view = schemas.Tenant.model_validate(tenant)
    if tenant.published is None and tenant.state != "retired":
        for job in await aside(tenancy.registry.jobs.list, tenant=tenant.name, limit=1):
            if job.state in ("failed", "cancelled"):
                view.failure = f"job {job.id} {job.state}: {job.message}"
    return view


async def _set_frozen(
    tenancy: TenantContext, principal: Principal, name: str, frozen: bool
) -> schemas.Tenant:
    name = require_tenant_access(principal, name)
    tenant = await service.set_frozen(tenancy, name, frozen, actor=principal.name)
    return schemas.Tenant.model_validate(tenant)


def _check_source(
    tenancy: TenantContext, principal: Principal, name: str, source: str | None
) -> None:
    """Check that the key may name this source, which is read with the server's own credentials.

    Errors: HTTPException unless the key is for all tenants, or the source is the tenant's own
    directory below a root.
    """
    own = {root / name for root in tenancy.store.rules.roots}
    if source is None or principal.whole_server or Path(source) in own:
        return
    raise HTTPException(
        403,
        f"a key for some tenants may name one source for {name!r}: the folder of that name in a "
        "directory that the server's `sources.roots` lists. Leave `source` out to have the "
        "tenant's own read again, or ask an operator with a key for all tenants.",
    )


async def _check_queue(tenancy: TenantContext, name: str) -> None:
    """Errors: ConflictError while the maximum number of the tenant's jobs is queued."""
    queued = await aside(tenancy.registry.jobs.list, tenant=name, state="queued", limit=MAX_QUEUED)
    if len(queued) == MAX_QUEUED:
        raise ConflictError(
            f"{MAX_QUEUED} jobs of tenant {name!r} wait already; try again when one has begun, or "
            "cancel one"
        )


def _switched(done: Published, principal: Principal) -> schemas.Switched:
    view = None if done.status is None else rollout_view(done.status, principal)
    return schemas.Switched.model_validate({"revision": done.revision, "rollout": view})
