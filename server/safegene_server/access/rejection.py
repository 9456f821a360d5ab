"""The one way in which this room says no: a status, OpenAI's error shape, and headers.

For raising before anything was sent. Not for the answers of the app behind.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from safegene_server.error_responses import error_response
from safegene_vllm.errors import SafegeneError

POLICY_VIOLATION = 1008


class RequestRejectedError(SafegeneError):
    """A request that goes no further; `param` names the field of the body that is to blame,
    `reason` why in one word, for counting: most have a body that will not do."""

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


async def reject(refusal: RequestRejectedError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the refusal; a websocket is closed where its server cannot answer in HTTP."""
    denial = "websocket.http.response" in (scope.get("extensions") or {})
    if scope["type"] == "websocket" and not denial:
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})
        return
    response = error_response(
        refusal.status, str(refusal), param=refusal.param, headers=refusal.headers
    )
    await response(scope, receive, send)
