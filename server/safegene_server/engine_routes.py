"""HTTP: /v1/safegene/receipts, /v1/safegene/ready, and vLLM's /v1/load_lora_adapter, verified.

Below /v1/ so that vLLM's --api-key guards them.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict

from safegene_server.access.middleware import SCOPE_KEY
from safegene_server.engine_client import load_error
from safegene_server.error_responses import (
    EngineDownError,
    ErrorRoute,
    error_response,
    plain,
    status_of,
)
from safegene_server.server_state import state_of
from safegene_server.verifier import Verifier

LOAD_PATH = "/v1/load_lora_adapter"
NO_FAMILY = (
    "no family loaded: this server was started without SafeGene settings; start it with "
    "`safegene serve MODEL --family DIR`."
)

router = APIRouter(route_class=ErrorRoute, tags=["safegene"])
load_router = APIRouter(route_class=ErrorRoute, tags=["safegene"])


class LoadBody(BaseModel):
    """Body of vLLM's own request; fields that a newer vLLM adds are passed on."""

    model_config = ConfigDict(extra="allow")

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


def _verifier(request: Request) -> Verifier | None:
    """Return None without a family. Errors: EngineDownError in a server without an engine."""
    if getattr(request.app.state, "engine_client", None) is None:
        raise EngineDownError("this server has no engine, so there is nothing to verify.")
    return state_of(request).verifier


def _replica_faults(request: Request) -> tuple[str, ...]:
    """Return why published revisions of the registry are not served here."""
    replica = state_of(request).replica
    return () if replica is None else replica.problems()


@router.get("/v1/safegene/receipts")
async def receipts(request: Request) -> JSONResponse:
    """Show what every rank applied, and whether that is what the files promise."""
    verifier = _verifier(request)
    if verifier is None:
        return JSONResponse({"ready": False, "faults": [NO_FAMILY], "receipts": []})
    report = await verifier.report()
    faults = [*report.faults, *_replica_faults(request)]
    return JSONResponse({"ready": not faults, "faults": faults, "receipts": list(report.ranks)})


@router.get("/v1/safegene/ready")
async def ready(request: Request) -> JSONResponse:
    """200 once everything that is served is verified, else 503; for probes and load balancers.

    Without a key, where the settings allow that, it names no tenant and is up to a second old;
    `receipts` says more.
    """
    verifier = _verifier(request)
    if verifier is None:
        return error_response(503, NO_FAMILY)
    replica = state_of(request).replica
    detailed = replica is None or request.scope.get(SCOPE_KEY) is not None
    report = await (verifier.report() if detailed else verifier.recent_report())
    if faults := [*report.faults, *_replica_faults(request)]:
        message = "\n".join(faults) if detailed else "not all that is published is applied here."
        return error_response(503, message)
    plan = verifier.plan
    header, base = plan.header, plan.base_profile
    body: dict[str, Any] = {
        "ready": True,
        "pid": os.getpid(),
        "family": None if header is None else {"name": header.name, "digest": header.digest},
        "apply": plan.settings.apply,
        "unprotected_mode": plan.settings.missing_profile == "serve_unprotected",
        "base": None
        if base is None
        else {"profile": base.digest, "layers": sum(1 for v in base.coefficients if v != 0.0)},
        "tenants": list(report.tenants) if detailed else [],
        "registry": None if replica is None else replica.version,
    }
    return JSONResponse(body)


@load_router.post(LOAD_PATH)
async def load_lora_adapter(body: LoadBody, request: Request) -> Response:
    """vLLM's own route, with the reason of a rejection; verified before it is published."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # A browser may send other types to another site without a preflight.
        raise HTTPException(400, f"content type {media_type!r}; expected application/json")
    return await publish(request.app.state.openai_serving_models, body)


async def publish(models: Any, body: LoadBody, *, param: str = "lora_path") -> Response:
    """Load and publish an adapter through vLLM's model list; a rejection carries its reason.

    `param` is the field of the request that names the directory.
    """
    load_error.set(None)
    result = await models.load_lora_adapter(body)
    if isinstance(result, str):
        return PlainTextResponse(result)
    error = load_error.get()
    if error is not None:
        return error_response(status_of(error), plain(error), param=param)
    content = result.model_dump()
    content["error"]["message"] = plain(content["error"]["message"])
    return JSONResponse(content, status_code=result.error.code)
