"""Routes of probes: results of the last ones, and a probe on request."""

from __future__ import annotations

from fastapi import APIRouter

from safegene_server.api.dependencies import (
    PrincipalDep,
    ProberDep,
    TenantContextDep,
    require_tenant_access,
)
from safegene_server.api.request_schemas import TenantName
from safegene_server.api.route_class import TenancyRoute
from safegene_server.monitoring import probes
from safegene_server.tenants.context import aside
from safegene_vllm.client import schemas

router = APIRouter(route_class=TenancyRoute, tags=["probes"])


@router.get("/probes", summary="List probes")
async def list_probes(prober: ProberDep, principal: PrincipalDep) -> schemas.Page[schemas.Probe]:
    """The key's tenants that are served here, each with the last counts of its revision.

    Every replica probes its own engine; these are those of the one that responds.
    """
    found = [status for status in prober.statuses() if principal.may_use(status.tenant)]
    return schemas.Page(data=[schemas.Probe.model_validate(status.record()) for status in found])


@router.post("/tenants/{name:path}/probe", status_code=202, summary="Probe a tenant")
async def probe(
    name: TenantName, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Onboarding:
    """Probe what it serves, now, by the returned job, on the replica that claims it.

    The same request again, before that job has ended, returns the same job.
    """
    name = require_tenant_access(principal, name)
    job = await probes.enqueue_probe(tenancy, name, actor=principal.name)
    tenant = await aside(tenancy.registry.tenants.get, name)
    return schemas.Onboarding.model_validate({"tenant": tenant, "job": job})
