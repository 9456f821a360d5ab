"""Routes of probes: what was counted last, and a probe now."""

from __future__ import annotations

from fastapi import APIRouter

from safegene_server.api import response_schemas
from safegene_server.api.dependencies import Asker, Here, Probing, own
from safegene_server.api.request_schemas import TenantName
from safegene_server.api.route_class import TenancyRoute
from safegene_server.monitoring import probes
from safegene_server.tenants.context import aside

router = APIRouter(route_class=TenancyRoute, tags=["probes"])


@router.get("/probes", summary="List probes")
async def list_probes(
    prober: Probing, asker: Asker
) -> response_schemas.Page[response_schemas.Probe]:
    """The key's tenants that are served here, each with the last counts of what it serves.

    Every replica probes its own engine; these are those of the one that answers.
    """
    found = prober.standings()
    return response_schemas.Page(
        data=[response_schemas.probe(s) for s in found if asker.may_use(s.tenant)]
    )


@router.post("/tenants/{name:path}/probe", status_code=202, summary="Probe a tenant")
async def probe(name: TenantName, tenancy: Here, asker: Asker) -> response_schemas.Onboarding:
    """What it serves, now, by the job in the answer: on the replica that claims it.

    The same request again, before that job has ended, answers with the same job.
    """
    job = await probes.start(tenancy, own(asker, name), actor=asker.name)
    tenant = await aside(tenancy.registry.tenant, name)
    return response_schemas.Onboarding(
        tenant=response_schemas.tenant(tenant), job=response_schemas.job(job)
    )
