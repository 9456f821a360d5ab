"""Routes of API keys: add, list, rotate, revoke.

A key for some tenants sees and makes only keys for no others.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Path

from safegene_server.access.catalog import Principal
from safegene_server.api import request_schemas
from safegene_server.api.dependencies import PrincipalDep, TenantContextDep
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import Key, NewKey
from safegene_server.registry.validation import BASE
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.client import schemas
from safegene_vllm.errors import NotFoundError

router = APIRouter(route_class=TenancyRoute, tags=["keys"])
KeyName = Annotated[str, Path(description="the key's name", examples=["acme-production"])]


@router.post("/keys", status_code=201, summary="Add a key")
async def add_key(
    body: request_schemas.NewKey, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.NewKey:
    """Its secret is shown in this response only."""
    beyond = sorted(_beyond(principal, body.tenants))
    if beyond:
        raise HTTPException(
            403, f"the key would reach further than yours: {', '.join(beyond)[:500]}"
        )
    made = await aside(
        tenancy.registry.keys.add,
        body.name,
        scopes=body.scopes,
        tenants=body.tenants,
        default_tenant=body.default_tenant,
        expires_at=body.expires_at,
        actor=principal.name,
    )
    await tenancy.settle()
    return _with_secret(made)


@router.get("/keys", summary="List keys")
async def list_keys(
    tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Page[schemas.Key]:
    """By name, revoked ones included, without secrets."""
    found = await aside(tenancy.registry.keys.list)
    visible = [key for key in found if not _beyond(principal, key.tenants)]
    return schemas.Page(data=[schemas.Key.model_validate(key) for key in visible])


@router.post("/keys/{name}/rotate", summary="Give a key a new secret")
async def rotate_key(
    name: KeyName, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.NewKey:
    """The old secret is invalid once this responds."""
    await _accessible(tenancy, principal, name)
    made = await aside(tenancy.registry.keys.rotate, name, actor=principal.name)
    await tenancy.settle()
    return _with_secret(made)


@router.delete("/keys/{name}", summary="Revoke a key")
async def revoke_key(
    name: KeyName, tenancy: TenantContextDep, principal: PrincipalDep
) -> schemas.Key:
    """It is invalid from now on. Nothing happens if it is revoked already."""
    key = await _accessible(tenancy, principal, name)
    if key.revoked_at is None:
        key = await aside(tenancy.registry.keys.revoke, name, actor=principal.name)
        await tenancy.settle()
    return schemas.Key.model_validate(key)


def _with_secret(made: NewKey) -> schemas.NewKey:
    key = schemas.Key.model_validate(made.key)
    return schemas.NewKey(**key.model_dump(), secret=made.secret)


async def _accessible(tenancy: TenantContext, principal: Principal, name: str) -> Key:
    """Errors: NotFoundError, also for a key that reaches further than the request's own."""
    key = await aside(tenancy.registry.keys.get, name)
    if _beyond(principal, key.tenants):
        raise NotFoundError(f"no key {name!r:.100} in the registry")
    return key


def _beyond(principal: Principal, tenants: tuple[str, ...] | list[str]) -> set[str]:
    """Return those of `tenants` that the request's own key does not reach."""
    if principal.whole_server:
        return set()
    return set(tenants) - principal.tenants - ({BASE} if principal.base else set())
