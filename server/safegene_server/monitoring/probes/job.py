"""Probe on request, as a job of the replica that claims it, on its engine."""

from __future__ import annotations

from safegene_server.monitoring.probes.prober import Prober
from safegene_server.registry import Job
from safegene_server.tenants import TenantContext, Work
from safegene_server.tenants.context import aside
from safegene_server.tenants.jobs import Handler
from safegene_server.tenants.service import ours
from safegene_vllm.errors import ConflictError

PROBE = "probe"


def probe_handler(prober: Prober) -> Handler:
    """Make the handler of PROBE jobs; their `result` has the counts."""

    async def probe(_tenancy: TenantContext, work: Work) -> str:
        async def step(done: float) -> None:
            await work.step(done, "probing")

        result = await prober.probe(work.job.tenant, on_request=True, step=step)
        work.result.update(result.record())
        return str(result)

    return probe


async def enqueue_probe(tenancy: TenantContext, name: str, *, actor: str) -> Job:
    """Enqueue a probe of the tenant; return the queued or running one, if any.

    Errors: NotFoundError; ConflictError if nothing is served, or only by servers of another family.
    """
    tenant = await ours(tenancy, name)
    if tenant.published is None:
        raise ConflictError(f"tenant {name!r} serves nothing to probe; publish a revision first")
    for state in ("running", "queued"):
        for job in await aside(tenancy.registry.jobs.list, tenant=name, state=state):
            if job.kind == PROBE:
                return job
    made = await aside(tenancy.registry.jobs.enqueue, PROBE, name, actor=actor)
    tenancy.job_added.set()
    return made
