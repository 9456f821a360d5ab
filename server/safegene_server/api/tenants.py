"""Routes of tenants: register, look, change, roll back, freeze, limit, retire.

A tenant's name may hold a slash, so the routes with a word after the name come first, and no tenant
may be called like one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException

from safegene_server import calibration
from safegene_server.access.catalog import Principal
from safegene_server.api import request_schemas, response_schemas
from safegene_server.api.dependencies import Asker, Here, own
from safegene_server.api.request_schemas import ExpectedQuery, TenantName
from safegene_server.api.rollout_views import followed, shown
from safegene_server.api.route_class import TenancyRoute
from safegene_server.tenants import TenantContext, service
from safegene_server.tenants.context import aside
from safegene_server.tenants.service import Published
from safegene_vllm.errors import ConflictError, RegistryError

MOST_QUEUED = 4
"""Jobs of one tenant that may wait: they are done one after the other, for all tenants in turn."""
WORDS = frozenset(
    {
        *("calibrate", "freeze", "limits", "probe", "profile", "publish", "revisions"),
        *("rollback", "unfreeze"),
    }
)
"""What may follow a tenant's name in a path."""

router = APIRouter(route_class=TenancyRoute, tags=["tenants"])


@router.post("/tenants", status_code=202, summary="Register a tenant")
async def register(
    body: request_schemas.Register, tenancy: Here, asker: Asker
) -> response_schemas.Onboarding:
    """Its content is fetched, checked, tried out and published by the job in the answer.

    With `calibrate`, that job finds its coefficients first, on this engine. The same request again
    answers with the same tenant and job.
    """
    second = body.name.partition("/")[2]
    if second in WORDS:
        raise RegistryError(
            f"tenant name {body.name!r}: its second part may not be one of "
            f"{', '.join(sorted(WORDS))}, which are words of this API"
        )
    name = own(asker, body.name)
    _may_read(tenancy, asker, name, body.source)
    given: dict[str, Any] = {
        "source": body.source,
        "first": body.first(),
        "limits": body.limits.given(),
        "publish": body.publish,
        "actor": asker.name,
    }
    if body.calibrate is None:
        tenant, job = await service.register(tenancy, name, **given)
    else:
        tenant, job = await calibration.register(tenancy, name, body.calibrate.asked(), **given)
    return response_schemas.Onboarding(
        tenant=response_schemas.tenant(tenant), job=response_schemas.job(job)
    )


@router.get("/tenants", summary="List tenants")
async def list_tenants(
    tenancy: Here, asker: Asker
) -> response_schemas.Page[response_schemas.Tenant]:
    """Those of the key, by name, the retired ones among them."""
    found = await aside(tenancy.registry.tenants)
    return response_schemas.Page(
        data=[response_schemas.tenant(t) for t in found if asker.may_use(t.name)]
    )


@router.post("/tenants/{name:path}/revisions", status_code=202, summary="Add a revision")
async def add_revision(
    name: TenantName, body: request_schemas.NewRevision, tenancy: Here, asker: Asker
) -> response_schemas.Onboarding:
    """New content from a source, brought into service by the job in the answer.

    The tenant stays on what it serves until that job publishes, and if it fails.
    """
    _may_read(tenancy, asker, own(asker, name), body.source)
    given: dict[str, Any] = {
        "source": body.source,
        "first": body.first(),
        "publish": body.publish,
        "expected": body.expected_revision,
        "actor": asker.name,
    }
    await _room_for_a_job(tenancy, name)
    if body.calibrate is None:
        job = await service.add_revision(tenancy, name, **given)
    else:
        job = await calibration.add_revision(tenancy, name, body.calibrate.asked(), **given)
    tenant = await aside(tenancy.registry.tenant, name)
    return response_schemas.Onboarding(
        tenant=response_schemas.tenant(tenant), job=response_schemas.job(job)
    )


@router.get("/tenants/{name:path}/revisions", summary="List a tenant's revisions")
async def list_revisions(
    name: TenantName, tenancy: Here, asker: Asker
) -> response_schemas.Page[response_schemas.Revision]:
    """All of them by number, with what the gate found and why some failed."""
    found = await aside(tenancy.registry.revisions, own(asker, name))
    return response_schemas.Page(data=[response_schemas.revision(revision) for revision in found])


@router.post("/tenants/{name:path}/calibrate", status_code=202, summary="Calibrate a tenant")
async def calibrate(
    name: TenantName, body: request_schemas.Calibrate, tenancy: Here, asker: Asker
) -> response_schemas.Onboarding:
    """Better coefficients for what is served, found on this engine by the job in the answer.

    Published if they are better on the examples that were held out; if not, the job says so and
    nothing changes.
    """
    await _room_for_a_job(tenancy, own(asker, name))
    job = await calibration.start(
        tenancy,
        name,
        body.asked(),
        publish=body.publish,
        expected=body.expected_revision,
        actor=asker.name,
    )
    tenant = await aside(tenancy.registry.tenant, name)
    return response_schemas.Onboarding(
        tenant=response_schemas.tenant(tenant), job=response_schemas.job(job)
    )


@router.patch("/tenants/{name:path}/profile", summary="Change coefficients")
async def change_profile(
    name: TenantName, body: request_schemas.ChangeProfile, tenancy: Here, asker: Asker
) -> response_schemas.Switched:
    """A new revision of the same adapter, served here when this answers.

    Requests under way finish on the revision that they began with. Nothing happens if the
    coefficients are what they were. `rollout` counts the servers that have reported, which this one
    does a moment after it has answered.
    """
    done = await service.change_profile(
        tenancy,
        own(asker, name),
        body.change(),
        expected=body.expected_revision,
        actor=asker.name,
    )
    return _switched(done, asker)


@router.post("/tenants/{name:path}/publish", summary="Publish a revision")
async def publish(
    name: TenantName, body: request_schemas.Publish, tenancy: Here, asker: Asker
) -> response_schemas.Switched:
    """A revision that is ready, or was served before."""
    done = await service.publish(
        tenancy,
        own(asker, name),
        body.number,
        expected=body.expected_revision,
        actor=asker.name,
    )
    return _switched(done, asker)


@router.post("/tenants/{name:path}/rollback", summary="Go back to an earlier revision")
async def roll_back(
    name: TenantName, tenancy: Here, asker: Asker, body: request_schemas.Rollback | None = None
) -> response_schemas.Switched:
    """To what was served before, or with `number` further back. Again: one further back.

    With `expected_revision`, a request that is sent twice goes back once.
    """
    body = body or request_schemas.Rollback()
    done = await service.roll_back(
        tenancy,
        own(asker, name),
        body.number,
        expected=body.expected_revision,
        actor=asker.name,
    )
    return _switched(done, asker)


@router.post("/tenants/{name:path}/freeze", summary="Freeze a tenant")
async def freeze(name: TenantName, tenancy: Here, asker: Asker) -> response_schemas.Tenant:
    """Serving goes on; what is served may not change until it is unfrozen."""
    own(asker, name)
    return response_schemas.tenant(await service.set_frozen(tenancy, name, True, actor=asker.name))


@router.post("/tenants/{name:path}/unfreeze", summary="Unfreeze a tenant")
async def unfreeze(name: TenantName, tenancy: Here, asker: Asker) -> response_schemas.Tenant:
    """It may change again, unless its family is frozen."""
    own(asker, name)
    return response_schemas.tenant(await service.set_frozen(tenancy, name, False, actor=asker.name))


@router.put("/tenants/{name:path}/limits", summary="Set a tenant's limits")
async def set_limits(
    name: TenantName, body: request_schemas.Limits, tenancy: Here, asker: Asker
) -> response_schemas.Tenant:
    """All of them: what is left out has no limit. They are counted per server process."""
    own(asker, name)
    return response_schemas.tenant(
        await service.set_limits(tenancy, name, body.given(), actor=asker.name)
    )


@router.get("/tenants/{name:path}", summary="Show a tenant")
async def show_tenant(name: TenantName, tenancy: Here, asker: Asker) -> response_schemas.Tenant:
    """What it is and what it serves."""
    return response_schemas.tenant(await aside(tenancy.registry.tenant, own(asker, name)))


@router.delete("/tenants/{name:path}", summary="Retire a tenant")
async def retire(
    name: TenantName, tenancy: Here, asker: Asker, expected_revision: ExpectedQuery = None
) -> response_schemas.Retired:
    """It is served no more, ever, and its jobs are cancelled. Its name and history stay."""
    tenant, rollout = await service.retire(
        tenancy, own(asker, name), expected=expected_revision, actor=asker.name
    )
    return response_schemas.Retired(
        tenant=response_schemas.tenant(tenant), rollout=await followed(tenancy, rollout, asker)
    )


def _may_read(tenancy: TenantContext, asker: Principal, name: str, source: str | None) -> None:
    """Sources are read with the server's own rights and credentials, whoever names them.

    Errors: HTTPException unless the key is for all tenants, or the source is the one folder that
    is this tenant's.
    """
    own_folders = {root / name for root in tenancy.store.rules.roots}
    if source is None or asker.whole_server or Path(source) in own_folders:
        return
    raise HTTPException(
        403,
        f"a key for some tenants may name one source for {name!r}: the folder of that name in a "
        "directory that the server's `sources.roots` lists. Leave `source` out to have the "
        "tenant's own read again, or ask whoever has a key for all tenants.",
    )


async def _room_for_a_job(tenancy: TenantContext, name: str) -> None:
    """Errors: ConflictError while as many of the tenant's jobs wait as may."""
    waiting = await aside(tenancy.registry.jobs, tenant=name, state="queued", limit=MOST_QUEUED)
    if len(waiting) == MOST_QUEUED:
        raise ConflictError(
            f"{MOST_QUEUED} jobs of tenant {name!r} wait already; try again when one has begun, or "
            "cancel one"
        )


def _switched(done: Published, asker: Principal) -> response_schemas.Switched:
    return response_schemas.Switched(
        revision=response_schemas.revision(done.revision),
        rollout=None if done.status is None else shown(done.status, asker),
    )
