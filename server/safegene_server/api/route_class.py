"""Route class of the tenant API, whose responses name no path of this server's store.

Messages of store, engine and jobs have whole paths in the log and in the registry, for the
operator; responses go to others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Coroutine
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from safegene_server.access.body import check_size
from safegene_server.access.catalog import Principal
from safegene_server.access.middleware import SCOPE_KEY
from safegene_server.error_responses import ErrorRoute
from safegene_server.server_state import ServerState

MAX_MEMBERS, MAX_VALUES = 20_000, 100_000
"""Limits of one body, as `check_size` counts. The largest valid one has 3,000 examples of two
members each; a profile's record may hold more values. A bad one costs a kilobyte of errors."""
STORE = b"STORE"
"""Replacement for the path of the store in a response."""


class TenancyRoute(ErrorRoute):
    """Route that hides the store's path, and the roots of sources from keys for some tenants."""

    async def check(self, request: Request) -> None:
        """Errors: RequestRejectedError for a body larger than any valid one; HTTPException."""
        try:
            body = await request.body()
        except ClientDisconnect:
            raise HTTPException(
                400, "the client disconnected before its body was complete."
            ) from None
        check_size(body, max_members=MAX_MEMBERS, max_values=MAX_VALUES)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def redacted(request: Request) -> Response:
            response = await handler(request)
            state: ServerState | None = getattr(request.app.state, "safegene", None)
            if state is not None and state.tenants is not None:
                store = state.tenants.store
                body = _store_pattern(store.root).sub(STORE, response.body)
                principal: Principal | None = request.scope.get(SCOPE_KEY)
                roots = store.rules.roots
                if roots and not (principal and principal.whole_server):
                    body = body.replace(_json(f" ({', '.join(map(str, roots))})"), b"")
                response.body = body
                response.headers["content-length"] = str(len(body))
            return response

        return redacted


@lru_cache
def _store_pattern(root: Path) -> re.Pattern[bytes]:
    """Match the store's path in JSON, where it begins a path."""
    paths = b"|".join(re.escape(_json(path)) for path in {str(root), os.path.realpath(root)})
    return re.compile(rb"(?:(?<![\w./-])|(?<=\\n))(?:" + paths + rb")(?![\w-])")


def _json(text: str) -> bytes:
    """Encode a text as in our responses, without the quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "surrogateescape")
