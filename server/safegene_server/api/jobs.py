"""Routes of jobs: list, show, cancel. Other routes start them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from safegene_server.access.catalog import EVERY_TENANT, Principal
from safegene_server.api.dependencies import (
    PrincipalDep,
    TenantContextDep,
    require_tenant_access,
)
from safegene_server.api.request_schemas import Id, Limit
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import Job, Registry
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.client import schemas
from safegene_vllm.client.schemas import JobState
from safegene_vllm.errors import NotFoundError

router = APIRouter(route_class=TenancyRoute, tags=["jobs"])


@router.get("/jobs", summary="List jobs")
async def list_jobs(
    tenancy: TenantContextDep,
    principal: PrincipalDep,
    tenant: Annotated[str | None, Query(examples=["acme/support"])] = None,
    state: JobState | None = None,
    limit: Limit = 100,
) -> schemas.Page[schemas.Job]:
    """Newest first."""
    if tenant is not None:
        require_tenant_access(principal, tenant)
    found = await aside(_jobs, tenancy.registry, principal, tenant, state, limit)
    return schemas.Page(data=[schemas.Job.model_validate(job) for job in found])


@router.get("/jobs/{job}", summary="Show a job")
async def show_job(job: Id, tenancy: TenantContextDep, principal: PrincipalDep) -> schemas.Job:
    """Its progress; once it has ended, its result."""
    return schemas.Job.model_validate(await _accessible(tenancy, principal, job))


@router.post("/jobs/{job}/cancel", summary="Cancel a job")
async def cancel_job(job: Id, tenancy: TenantContextDep, principal: PrincipalDep) -> schemas.Job:
    """A queued job ends at once, a running one after its present step; its revision has failed.

    Nothing happens if it is cancelled already; 409 if it has ended in another way.
    """
    found = await _accessible(tenancy, principal, job)
    if found.state != "cancelled":
        found = await aside(tenancy.registry.jobs.cancel, job, actor=principal.name)
    return schemas.Job.model_validate(found)


def _jobs(
    registry: Registry,
    principal: Principal,
    tenant: str | None,
    state: JobState | None,
    limit: int,
) -> list[Job]:
    if tenant is not None or principal.whole_server:
        return list(registry.jobs.list(tenant=tenant, state=state, limit=limit))
    names = sorted(principal.tenants - {EVERY_TENANT})
    jobs = [job for n in names for job in registry.jobs.list(tenant=n, state=state, limit=limit)]
    return sorted(jobs, key=lambda job: -job.id)[:limit]


async def _accessible(tenancy: TenantContext, principal: Principal, job: int) -> Job:
    """Errors: NotFoundError, also for a job of another key's tenant."""
    found = await aside(tenancy.registry.jobs.get, job)
    if not principal.may_use(found.tenant):
        raise NotFoundError(f"no job {job!r:.40} in the registry")
    return found
