"""Rejection of a request before it reaches the app: a status, OpenAI's error shape, and headers."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from safegene_server.error_responses import error_response
from safegene_vllm.errors import SafegeneError

POLICY_VIOLATION = 1008


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
    await response(scope, receive, send)
