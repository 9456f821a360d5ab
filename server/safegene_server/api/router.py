"""All routes of this room in one router, for an app to include.

Behind `Access` only: every route asks it who is there. `app.state.safegene_tenancy` holds the
`Tenancy`, or None in a server without a registry.
"""

from __future__ import annotations

from fastapi import APIRouter

from safegene_server.api import families, jobs, keys, operations, probes, tenants
from safegene_server.api.response_schemas import ErrorAnswer

REFUSALS = {
    400: "The request is not understood, or asks for something that cannot be.",
    403: "The key may not do this.",
    404: "There is no such thing, or it is not this key's.",
    409: "The state forbids it: frozen, changed by somebody else, or no registry on this server.",
    413: "The body is larger than this server takes.",
    503: "The engine or the registry does not answer; try again.",
}

router = APIRouter(
    prefix="/v1/safegene",
    responses={
        status: {"model": ErrorAnswer, "description": text} for status, text in REFUSALS.items()
    },
)
for room in (tenants, families, keys, jobs, probes, operations):
    router.include_router(room.router)
