"""Route class of the tenant API: its requests are bounded, its errors name no path of the server.

Sources are named as they were given. The log has the whole messages, for the operator.
"""

from __future__ import annotations

import logging

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from safegene_server.access.body import check_size
from safegene_server.error_responses import EngineDownError, ErrorRoute, plain, public_message
from safegene_vllm.errors import SafegeneError

logger = logging.getLogger("vllm.safegene_server")
MAX_MEMBERS, MAX_VALUES = 20_000, 100_000
"""Limits of one body, as `check_size` counts. The largest valid one has 3,000 examples of two
members each; a profile's record may hold more values. A bad one costs a kilobyte of errors."""


class TenancyRoute(ErrorRoute):
    """Route of the tenant API."""

    async def check(self, request: Request) -> None:
        """Errors: RequestRejectedError for a body larger than any valid one; HTTPException."""
        try:
            body = await request.body()
        except ClientDisconnect:
            raise HTTPException(
                400, "the client disconnected before its body was complete."
            ) from None
        check_size(body, max_members=MAX_MEMBERS, max_values=MAX_VALUES)

    def message(self, error: SafegeneError | EngineDownError) -> str:
        """Return the public message; what it leaves out is logged."""
        public = public_message(error)
        if public != (whole := plain(error)):
            logger.error("SafeGene: %s", whole)
        return public
