"""Routes of API keys: add, list, rotate, revoke. A secret is told once, by the call that made it.

A key for some tenants sees and makes only keys that reach no further than itself.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Path

from safegene_server.access.catalog import Principal
from safegene_server.api import request_schemas, response_schemas
from safegene_server.api.dependencies import Asker, Here
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import Key
from safegene_server.registry.validation import BASE
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.errors import NotFoundError

router = APIRouter(route_class=TenancyRoute, tags=["keys"])
KeyName = Annotated[str, Path(description="the key's name", examples=["acme-production"])]


@router.post("/keys", status_code=201, summary="Add a key")
async def add_key(
    body: request_schemas.NewKey, tenancy: Here, asker: Asker
) -> response_schemas.NewKey:
    """The answer is the only place where its secret is ever told."""
    beyond = sorted(_beyond(asker, body.tenants))
    if beyond:
        raise HTTPException(
            403, f"the key would reach further than yours: {', '.join(beyond)[:500]}"
        )
    made = await aside(
        tenancy.registry.add_key,
        body.name,
        scopes=body.scopes,
        tenants=body.tenants,
        default_tenant=body.default_tenant,
        expires_at=body.expires_at,
        actor=asker.name,
    )
    await tenancy.settle()
    return response_schemas.new_key(made)


@router.get("/keys", summary="List keys")
async def list_keys(tenancy: Here, asker: Asker) -> response_schemas.Page[response_schemas.Key]:
    """By name, the revoked ones among them; no secrets."""
    found = await aside(tenancy.registry.keys)
    return response_schemas.Page(
        data=[response_schemas.key(key) for key in found if not _beyond(asker, key.tenants)]
    )


@router.post("/keys/{name}/rotate", summary="Give a key a new secret")
async def rotate_key(name: KeyName, tenancy: Here, asker: Asker) -> response_schemas.NewKey:
    """The old secret ends with this call."""
    await _own(tenancy, asker, name)
    made = await aside(tenancy.registry.rotate_key, name, actor=asker.name)
    await tenancy.settle()
    return response_schemas.new_key(made)


@router.delete("/keys/{name}", summary="Revoke a key")
async def revoke_key(name: KeyName, tenancy: Here, asker: Asker) -> response_schemas.Key:
    """It lets nobody in any more. Nothing happens if it is revoked already."""
    key = await _own(tenancy, asker, name)
    if key.revoked_at is None:
        key = await aside(tenancy.registry.revoke_key, name, actor=asker.name)
        await tenancy.settle()
    return response_schemas.key(key)


async def _own(tenancy: TenantContext, asker: Principal, name: str) -> Key:
    """Errors: NotFoundError, also for a key that reaches further than the asker's."""
    key = await aside(tenancy.registry.key, name)
    if _beyond(asker, key.tenants):
        raise NotFoundError(f"no key {name!r:.100} in the registry")
    return key


def _beyond(asker: Principal, tenants: tuple[str, ...] | list[str]) -> set[str]:
    """What of `tenants` the asker's own key does not reach."""
    if asker.whole_server:
        return set()
    return set(tenants) - asker.tenants - ({BASE} if asker.base else set())
