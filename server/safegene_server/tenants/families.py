"""What may be done to all tenants of a family at once: a floor, and a freeze.

The registry decides and remembers; here it is made live in this process.
"""

from __future__ import annotations

from collections.abc import Mapping

from safegene_server.registry import Rollout
from safegene_server.tenants.context import TenantContext, aside


async def set_floor(
    tenancy: TenantContext, family: str, floor: Mapping[int, float], *, actor: str
) -> Rollout | None:
    """No coefficient of the family below `floor`; None if nobody had to be raised.

    Errors: NotFoundError, BoundsError, FrozenError.
    """
    rollout = await aside(tenancy.registry.policies.set_floor, family, floor, actor=actor)
    await tenancy.settle()
    return rollout


async def set_family_frozen(
    tenancy: TenantContext, family: str, frozen: bool, *, actor: str
) -> None:
    """No tenant of the family may change what it serves. Errors: NotFoundError."""
    registry = tenancy.registry
    step = registry.policies.freeze if frozen else registry.policies.unfreeze
    await aside(step, family, actor=actor)
    await tenancy.settle()
