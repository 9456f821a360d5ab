"""FastAPI dependencies of the tenant routes: tenant context, prober, and the request's key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, HTTPException, Request

from safegene_server.access.catalog import Principal
from safegene_server.access.middleware import principal_of
from safegene_server.monitoring.probes import Prober
from safegene_server.server_state import ServerState
from safegene_server.tenants import TenantContext
from safegene_vllm.errors import ConflictError, NotFoundError

NO_REGISTRY = (
    "this server runs without a registry, so it has no tenants of its own to show or change; start "
    "it with one, or use --lora-modules."
)
ALL_TENANTS_ONLY = "this route concerns all tenants; the key is for some of them."


def tenant_context(request: Request) -> TenantContext:
    """Errors: ConflictError in a server without a registry."""
    state: ServerState | None = getattr(request.app.state, "safegene", None)
    if state is None or state.tenants is None:
        raise ConflictError(NO_REGISTRY)
    return state.tenants


def prober(request: Request) -> Prober:
    """Errors: ConflictError in a server without a registry."""
    state: ServerState | None = getattr(request.app.state, "safegene", None)
    if state is None or state.prober is None:
        raise ConflictError(NO_REGISTRY)
    return state.prober


def principal(request: Request) -> Principal:
    """Errors: HTTPException, 403, in a server whose access check has seen no key."""
    try:
        found = principal_of(request.scope)
    except KeyError:
        found = None
    if found is None:
        raise HTTPException(403, "this route needs a key, and this server has checked none.")
    return found


TenantContextDep = Annotated[TenantContext, Depends(tenant_context)]
ProberDep = Annotated[Prober, Depends(prober)]
PrincipalDep = Annotated[Principal, Depends(principal)]


def require_tenant_access(principal: Principal, tenant: str) -> str:
    """Return `tenant` if the key is for it; else raise the same error as for an unknown one."""
    if not principal.may_use(tenant):
        raise NotFoundError(f"no tenant {tenant!r:.200} in the registry")
    return tenant


def require_all_tenants(principal: Principal) -> None:
    """Errors: HTTPException, 403, for a key for some tenants only."""
    if not principal.whole_server:
        raise HTTPException(403, ALL_TENANTS_ONLY)
