"""Routes of families: show them, set a floor under all coefficients, freeze all tenants.

A change of a family changes all of its tenants, so it needs a key for all of them.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from safegene_server.access.catalog import Principal
from safegene_server.api import request_schemas
from safegene_server.api.dependencies import PrincipalDep, TenantContextDep, require_all_tenants
from safegene_server.api.operations import rollout_view_or_none
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import Family, Registry
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.client import schemas

router = APIRouter(route_class=TenancyRoute, tags=["families"])
Digest = Annotated[str, Path(description="the family's digest", examples=["sha256:" + "ab" * 32])]


@router.get("/families", summary="List families")
async def list_families(
    tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Page[schemas.Family]:
    """All of them, in the order of registration."""

    def read() -> list[schemas.Family]:
        registry = tenancy.registry
        return [_view(registry, family, principal) for family in registry.families.list()]

    return schemas.Page(data=await aside(read))


@router.get("/families/{digest}", summary="Show a family")
async def show_family(
    digest: Digest, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Family:
    """Its layers, bounds and floor, and whether it is frozen."""
    return await aside(_read, tenancy.registry, digest, principal)


@router.put("/families/{digest}/floor", summary="Set the floor of a family")
async def set_floor(
    digest: Digest,
    body: request_schemas.Floor,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
) -> schemas.Floored:
    """No tenant is served below it from now on: those below get a raised revision, all at once."""
    require_all_tenants(principal)
    floor = body.floor
    rollout = await aside(tenancy.registry.policies.set_floor, digest, floor, actor=principal.name)
    await tenancy.settle()
    return schemas.Floored(
        family=await aside(_read, tenancy.registry, digest, principal),
        rollout=await rollout_view_or_none(tenancy, rollout, principal),
    )


@router.post("/families/{digest}/freeze", summary="Freeze all tenants of a family")
async def freeze(
    digest: Digest, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Family:
    """Serving continues; what is served may not change until the family is unfrozen."""
    return await _set_frozen(tenancy, principal, digest, True)


@router.post("/families/{digest}/unfreeze", summary="Unfreeze the tenants of a family")
async def unfreeze(
    digest: Digest, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Family:
    """They may change again, except those that are frozen themselves."""
    return await _set_frozen(tenancy, principal, digest, False)


def _read(registry: Registry, digest: str, principal: Principal) -> schemas.Family:
    return _view(registry, registry.families.get(digest), principal)


def _view(registry: Registry, family: Family, principal: Principal) -> schemas.Family:
    """Join a family with its policy; its source is for keys for all tenants."""
    policy = registry.policies.get(family.digest)
    return schemas.Family(
        digest=family.digest,
        name=family.name,
        source=family.source if principal.whole_server else None,
        num_layers=family.header.num_layers,
        layers=[entry.layer for entry in family.header.layers],
        bounds=family.header.bounds,
        floor={str(layer): minimum for layer, minimum in policy.floor.items()},
        frozen=policy.frozen,
        created_at=family.created_at,
    )


async def _set_frozen(
    tenancy: TenantContext, principal: Principal, digest: str, frozen: bool
) -> schemas.Family:
    require_all_tenants(principal)
    policies = tenancy.registry.policies
    await aside(policies.freeze if frozen else policies.unfreeze, digest, actor=principal.name)
    await tenancy.settle()
    return await aside(_read, tenancy.registry, digest, principal)
