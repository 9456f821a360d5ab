"""Routes of families: what they are, a floor under all coefficients, and a freeze of all tenants.

Whoever changes a family changes all of its tenants, so these need a key for all of them.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from safegene_server.access.catalog import Principal
from safegene_server.api import request_schemas, response_schemas
from safegene_server.api.dependencies import Asker, Here, whole_server
from safegene_server.api.rollout_views import followed
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import Family, Registry
from safegene_server.tenants import families
from safegene_server.tenants.context import aside

router = APIRouter(route_class=TenancyRoute, tags=["families"])
Digest = Annotated[str, Path(description="the family's digest", examples=["sha256:" + "ab" * 32])]


@router.get("/families", summary="List families")
async def list_families(
    tenancy: Here, asker: Asker
) -> response_schemas.Page[response_schemas.Family]:
    """All of them, in the order in which they came."""
    return response_schemas.Page(data=await aside(_all, tenancy.registry, asker))


@router.get("/families/{digest}", summary="Show a family")
async def show_family(digest: Digest, tenancy: Here, asker: Asker) -> response_schemas.Family:
    """Its layers, its bounds, its floor, and whether it is frozen."""
    return await aside(_one, tenancy.registry, digest, asker)


@router.put("/families/{digest}/floor", summary="Set the floor of a family")
async def set_floor(
    digest: Digest, body: request_schemas.Floor, tenancy: Here, asker: Asker
) -> response_schemas.Floored:
    """No tenant is served below it, from now on: whoever is gets a raised revision, all at once."""
    whole_server(asker)
    rollout = await families.set_floor(tenancy, digest, body.floor, actor=asker.name)
    return response_schemas.Floored(
        family=await aside(_one, tenancy.registry, digest, asker),
        rollout=await followed(tenancy, rollout, asker),
    )


@router.post("/families/{digest}/freeze", summary="Freeze all tenants of a family")
async def freeze(digest: Digest, tenancy: Here, asker: Asker) -> response_schemas.Family:
    """Serving goes on; what they serve may not change until the family is unfrozen."""
    whole_server(asker)
    await families.set_family_frozen(tenancy, digest, True, actor=asker.name)
    return await aside(_one, tenancy.registry, digest, asker)


@router.post("/families/{digest}/unfreeze", summary="Unfreeze the tenants of a family")
async def unfreeze(digest: Digest, tenancy: Here, asker: Asker) -> response_schemas.Family:
    """They may change again, except those that are frozen themselves."""
    whole_server(asker)
    await families.set_family_frozen(tenancy, digest, False, actor=asker.name)
    return await aside(_one, tenancy.registry, digest, asker)


def _one(registry: Registry, digest: str, asker: Principal) -> response_schemas.Family:
    return _told(registry, registry.family(digest), asker)


def _all(registry: Registry, asker: Principal) -> list[response_schemas.Family]:
    return [_told(registry, found, asker) for found in registry.families()]


def _told(registry: Registry, found: Family, asker: Principal) -> response_schemas.Family:
    told = response_schemas.family(found, registry.policy(found.digest))
    return told if asker.whole_server else told.model_copy(update={"source": None})
