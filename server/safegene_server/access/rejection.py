"""Rejection of a request before it reaches the app: a status, an error shape, and headers.

The shape is OpenAI's, or Anthropic's on the routes of its API.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from safegene_server.access.route_permissions import route_path
from safegene_server.error_responses import error_response
from safegene_vllm.errors import SafegeneError

POLICY_VIOLATION = 1008
ANTHROPIC = "/v1/messages"
"""Routes of Anthropic's API, whose clients expect its error shape."""
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class RequestRejectedError(SafegeneError):
    """A request that is rejected; `param` names the bad field, `reason` is the metric's label."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str = "body",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers
        self.reason = reason


async def reject(error: RequestRejectedError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the error; a websocket is closed where its server cannot respond in HTTP."""
    denial = "websocket.http.response" in (scope.get("extensions") or {})
    if scope["type"] == "websocket" and not denial:
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})
        return
    response = error_response(error.status, str(error), param=error.param, headers=error.headers)
    if route_path(scope).startswith(ANTHROPIC):
        body = {"type": "error", "error": {"type": _kind(error.status), "message": str(error)}}
        response = JSONResponse(body, status_code=error.status, headers=error.headers)
    await response(scope, receive, send)


def _kind(status: int) -> str:
    """Return Anthropic's name of an error."""
    return _ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
