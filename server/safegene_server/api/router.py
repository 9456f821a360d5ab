"""Router of the tenant API, to be included behind `AccessMiddleware` only.

`app.state.safegene` holds the `ServerState`; its `tenants` is None without a registry.
"""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from safegene_server.api import families, jobs, keys, operations, probes, tenants, usage

ERRORS = {
    400: "The request is invalid, or requests something impossible.",
    403: "The key may not do this.",
    404: "Not found, or not for this key.",
    409: "The state forbids it: frozen, changed concurrently, or no registry on this server.",
    413: "The body is larger than this server accepts.",
    503: "The engine or the registry does not respond; try again.",
}


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(BaseModel):
    """Body of every error."""

    error: ErrorDetail


router = APIRouter(
    prefix="/v1/safegene",
    responses={
        status: {"model": ErrorResponse, "description": text} for status, text in ERRORS.items()
    },
)
for module in (tenants, families, keys, jobs, probes, usage, operations):
    router.include_router(module.router)
