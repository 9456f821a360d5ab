"""How far a rollout is, for the answers that tell of one.

For asking the registry; blocks, so the routes call it in a thread.
"""

from __future__ import annotations

from safegene_server.access.catalog import Principal
from safegene_server.api import shapes
from safegene_server.registry import Registry, Rollout
from safegene_server.tenants import Tenancy
from safegene_server.tenants.tenancy import aside


def follow(registry: Registry, rollout: int, asker: Principal) -> shapes.Rollout:
    """Its tenants and revisions as far as the key may see them. Errors: UnknownError."""
    status = registry.rollout_status(rollout)
    found = status.rollout
    return shapes.Rollout(
        id=found.id,
        kind=found.kind,
        tenants=[name for name in found.tenants if asker.may_use(name)],
        revisions=[r.served_name for r in status.revisions if asker.may_use(r.tenant)],
        applied=status.applied,
        live=status.live,
        done=status.done,
        lagging=[
            shapes.Lagging(replica=lag.replica.id, reason=_reason(lag.reason, asker))
            for lag in status.lagging
        ],
        created_at=found.created_at,
        created_by=found.created_by,
    )


def _reason(reason: str, asker: Principal) -> str:
    """A replica's faults may name anybody's tenants."""
    return reason if asker.whole_server else "has not applied this rollout yet"


async def followed(
    tenancy: Tenancy, rollout: Rollout | None, asker: Principal
) -> shapes.Rollout | None:
    if rollout is None:
        return None
    return await aside(follow, tenancy.registry, rollout.id, asker)
