"""Routes of jobs: what runs, how far it is, and an end to it.

For looking and cancelling; jobs are begun by what they are for.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from safegene_server.access.catalog import EVERY_TENANT, Principal
from safegene_server.api import response_schemas
from safegene_server.api.dependencies import Asker, Here, own
from safegene_server.api.request_schemas import Id, Limit
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import Job, Registry
from safegene_server.registry.records import JobState
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.errors import NotFoundError

router = APIRouter(route_class=TenancyRoute, tags=["jobs"])


@router.get("/jobs", summary="List jobs")
async def list_jobs(
    tenancy: Here,
    asker: Asker,
    tenant: Annotated[str | None, Query(examples=["acme/support"])] = None,
    state: JobState | None = None,
    limit: Limit = 100,
) -> response_schemas.Page[response_schemas.Job]:
    """The newest first."""
    if tenant is not None:
        own(asker, tenant)
    found = await aside(_of, tenancy.registry, asker, tenant, state, limit)
    return response_schemas.Page(data=[response_schemas.job(job) for job in found])


@router.get("/jobs/{job}", summary="Show a job")
async def show_job(job: Id, tenancy: Here, asker: Asker) -> response_schemas.Job:
    """How far it is; once it has ended, what came of it."""
    return response_schemas.job(await _own(tenancy, asker, job))


@router.post("/jobs/{job}/cancel", summary="Cancel a job")
async def cancel_job(job: Id, tenancy: Here, asker: Asker) -> response_schemas.Job:
    """A waiting job ends at once, a running one after its present step; its revision has failed.

    Nothing happens if it is cancelled already; 409 if it has ended in another way.
    """
    found = await _own(tenancy, asker, job)
    if found.state != "cancelled":
        found = await aside(tenancy.registry.cancel, job, actor=asker.name)
    return response_schemas.job(found)


def _of(
    registry: Registry,
    asker: Principal,
    tenant: str | None,
    state: JobState | None,
    limit: int,
) -> list[Job]:
    if tenant is not None or asker.whole_server:
        return list(registry.jobs(tenant=tenant, state=state, limit=limit))
    names = sorted(asker.tenants - {EVERY_TENANT})
    jobs = [job for n in names for job in registry.jobs(tenant=n, state=state, limit=limit)]
    return sorted(jobs, key=lambda job: -job.id)[:limit]


async def _own(tenancy: TenantContext, asker: Principal, job: int) -> Job:
    """Errors: NotFoundError, also for a job of somebody else's tenant."""
    found = await aside(tenancy.registry.job, job)
    if not asker.may_use(found.tenant):
        raise NotFoundError(f"no job {job!r:.40} in the registry")
    return found
