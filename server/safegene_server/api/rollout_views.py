"""How far a rollout is, for the answers that tell of one: as much of it as a key may see."""

from __future__ import annotations

from safegene_server.access.catalog import Principal
from safegene_server.api import response_schemas
from safegene_server.registry import Rollout, RolloutStatus
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside


def shown(status: RolloutStatus, asker: Principal) -> response_schemas.Rollout:
    """Its tenants and revisions as far as the key may see them."""
    found = status.rollout
    return response_schemas.Rollout(
        id=found.id,
        kind=found.kind,
        tenants=[name for name in found.tenants if asker.may_use(name)],
        revisions=[r.served_name for r in status.revisions if asker.may_use(r.tenant)],
        applied=status.applied,
        live=status.live,
        done=status.done,
        lagging=[
            response_schemas.Lagging(replica=lag.replica.id, reason=_reason(lag.reason, asker))
            for lag in status.lagging
        ],
        created_at=found.created_at,
        created_by=found.created_by,
    )


def _reason(reason: str, asker: Principal) -> str:
    """A replica's faults may name anybody's tenants."""
    return reason if asker.whole_server else "has not applied this rollout yet"


async def followed(
    tenancy: TenantContext, rollout: Rollout | None, asker: Principal
) -> response_schemas.Rollout | None:
    if rollout is None:
        return None
    return shown(await aside(tenancy.registry.rollout_status, rollout.id), asker)
