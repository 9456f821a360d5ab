"""Views of a rollout, limited to what a key may see."""

from __future__ import annotations

from safegene_server.access.catalog import Principal
from safegene_server.registry import Rollout, RolloutStatus
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.client import schemas


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
