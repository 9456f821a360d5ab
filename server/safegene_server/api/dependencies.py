"""Who asks, and what they may see: for every route to begin with.

A key for some tenants sees those, and is told of others what it would be told of none.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, HTTPException, Request

from safegene_server.access.catalog import Principal
from safegene_server.access.middleware import principal_of
from safegene_server.monitoring.probes import Prober
from safegene_server.tenants import TenantContext
from safegene_vllm.errors import ConflictError, NotFoundError

NO_REGISTRY = (
    "this server runs without a registry, so it has no tenants of its own to show or change; start "
    "it with one, or use --lora-modules."
)
WHOLE_SERVER = "this route concerns all tenants; the key is for some of them."


def tenancy_of(request: Request) -> TenantContext:
    """Errors: ConflictError in a server without a registry."""
    found: TenantContext | None = getattr(request.app.state, "safegene_tenancy", None)
    if found is None:
        raise ConflictError(NO_REGISTRY)
    return found


def prober_of(request: Request) -> Prober:
    """Errors: ConflictError in a server without a registry."""
    found: Prober | None = getattr(request.app.state, "safegene_prober", None)
    if found is None:
        raise ConflictError(NO_REGISTRY)
    return found


def asker_of(request: Request) -> Principal:
    """Errors: HTTPException where nobody has looked at a key: such a server answers nobody."""
    try:
        principal = principal_of(request.scope)
    except KeyError:
        principal = None
    if principal is None:
        raise HTTPException(403, "this route needs a key, and this server has checked none.")
    return principal


Here = Annotated[TenantContext, Depends(tenancy_of)]
Probing = Annotated[Prober, Depends(prober_of)]
Asker = Annotated[Principal, Depends(asker_of)]


def own(asker: Principal, tenant: str) -> str:
    """`tenant` if the key is for it; else the very words for one that is not there."""
    if not asker.may_use(tenant):
        raise NotFoundError(f"no tenant {tenant!r:.200} in the registry")
    return tenant


def whole_server(asker: Principal) -> None:
    """Errors: HTTPException for a key for some tenants only."""
    if not asker.whole_server:
        raise HTTPException(403, WHOLE_SERVER)
