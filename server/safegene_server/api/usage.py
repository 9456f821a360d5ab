"""Route of usage: requests and tokens by day, tenant and key, as JSON or CSV."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import date
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse

from safegene_server.access.catalog import EVERY_TENANT, Principal
from safegene_server.api.dependencies import PrincipalDep, TenantContextDep
from safegene_server.api.route_class import TenancyRoute
from safegene_server.registry import UsageCursor, UsagePage
from safegene_server.server_state import state_of
from safegene_server.tenants import TenantContext
from safegene_server.tenants.context import aside
from safegene_vllm.client import schemas
from safegene_vllm.errors import NotFoundError

PAGE = 1000
_CSV = "text/csv"

Read = Callable[[UsageCursor | None, int], Awaitable[UsagePage]]

router = APIRouter(route_class=TenancyRoute, tags=["operation"])


@router.get(
    "/usage",
    summary="Read usage",
    response_model=schemas.UsagePage,
    responses={200: {"content": {_CSV: {"schema": {"type": "string"}}}}},
)
async def read_usage(
    request: Request,
    tenancy: TenantContextDep,
    principal: PrincipalDep,
    since: Annotated[
        date | None, Query(description="first day in UTC", examples=["2031-05-01"])
    ] = None,
    until: Annotated[
        date | None, Query(description="last day in UTC", examples=["2031-05-31"])
    ] = None,
    tenant: Annotated[
        str | None, Query(description="or a base model's name", examples=["acme/support"])
    ] = None,
    key: Annotated[str | None, Query(description="name of a key", examples=["acme-app"])] = None,
    format: Annotated[
        Literal["json", "csv"] | None,
        Query(description="default: as `Accept` requests, else json; csv has all rows"),
    ] = None,
    cursor: Annotated[str | None, Query(max_length=4096)] = None,
    limit: Annotated[int | None, Query(ge=1, le=PAGE, description=f"default: {PAGE}")] = None,
) -> schemas.UsagePage | Response:
    """Requests and tokens by day, tenant and key, newest day first, of the key's own tenants.

    All replicas together, up to the last 10 seconds. A request that was rejected does not count;
    one that failed counts without tokens.
    """
    if since is not None and until is not None and since > until:
        raise HTTPException(400, f"since = {since} is after until = {until}; exchange them.")
    base_models = state_of(request).catalog.view.base_models
    read: Read = partial(
        _page, tenancy, since, until, _tenants(principal, base_models, tenant), key
    )
    if format == "csv" or (format is None and _accepts_csv(request)):
        if cursor is not None or limit is not None:
            raise HTTPException(400, "CSV has all rows; leave out `cursor` and `limit`.")
        # The first page is read before the response begins, so that an error has its status.
        rows = _csv(await read(None, PAGE), read)
        headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
        return StreamingResponse(rows, media_type=_CSV, headers=headers)
    page = await read(None if cursor is None else _decode(cursor), limit or PAGE)
    return schemas.UsagePage(
        data=[schemas.Usage.model_validate(row) for row in page.rows],
        cursor=None if page.cursor is None else _encode(page.cursor),
    )


def _tenants(
    principal: Principal, base_models: tuple[str, ...], tenant: str | None
) -> frozenset[str] | None:
    """Return the tenants to read; None for all.

    A base model takes precedence over a tenant of its name, so its usage is for keys of the base.
    Errors: NotFoundError for a tenant that is not the key's, as for an unknown one.
    """
    if principal.whole_server:
        return None if tenant is None else frozenset({tenant})
    own = principal.tenants - {EVERY_TENANT} - set(base_models)
    own |= set(base_models if principal.base else ())
    if tenant is None:
        return own
    if tenant not in own:
        raise NotFoundError(f"no tenant {tenant!r:.200} in the registry")
    return frozenset({tenant})


async def _page(
    tenancy: TenantContext,
    since: date | None,
    until: date | None,
    tenants: frozenset[str] | None,
    key: str | None,
    cursor: UsageCursor | None,
    limit: int,
) -> UsagePage:
    return await aside(
        tenancy.registry.usage.list,
        since=since,
        until=until,
        tenants=tenants,
        key=key,
        cursor=cursor,
        limit=limit,
    )


async def _csv(page: UsagePage, read: Read) -> AsyncIterator[str]:
    """Yield the header and all rows from `page` on."""
    header = True
    while True:
        rows = [schemas.Usage.model_validate(row) for row in page.rows]
        yield schemas.usage_csv(rows, header=header)
        header = False
        if page.cursor is None:
            return
        page = await read(page.cursor, PAGE)


def _accepts_csv(request: Request) -> bool:
    """Return whether `Accept` names CSV before JSON."""
    accepted = request.headers.get("accept", "").lower()
    kinds = [kind.partition(";")[0].strip() for kind in accepted.split(",")]
    first = next((kind for kind in kinds if kind in (_CSV, "application/json")), None)
    return first == _CSV


def _encode(cursor: UsageCursor) -> str:
    day, *names = cursor
    return base64.urlsafe_b64encode(json.dumps([day.isoformat(), *names]).encode()).decode()


def _decode(cursor: str) -> UsageCursor:
    """Errors: HTTPException, 400."""
    try:
        day, tenant, key = json.loads(base64.urlsafe_b64decode(cursor))
        if not isinstance(tenant, str) or not isinstance(key, str):
            raise ValueError("expected names")
        return date.fromisoformat(day), tenant, key
    except (ValueError, TypeError, RecursionError):
        raise HTTPException(
            400, "`cursor` is none of this route's; use the one of the last page."
        ) from None
