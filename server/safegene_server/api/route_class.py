"""The class of every route here: what it answers names no path of this machine's store.

Messages of store, engine and jobs are written for who runs the machine, with whole paths, and stay
so in the log and in the registry. Here they leave for others.
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
from safegene_server.tenants import TenantContext

MAX_MEMBERS, MAX_VALUES = 20_000, 100_000
"""Of one body, as `check_size` counts them. The largest that is understood has 3,000 examples of
two members each; a profile's record may hold more values. A bad one costs a kilobyte of errors."""
STORE = b"STORE"
"""What stands in an answer for the path of the store."""


class TenancyRoute(ErrorRoute):
    """Names no path of the store to anybody, and to keys for some tenants no roots of sources."""

    async def check(self, request: Request) -> None:
        """Errors: Refusal for a body of more values than any of ours has; HTTPException."""
        try:
            sent = await request.body()
        except ClientDisconnect:
            raise HTTPException(400, "the client left before its body was whole.") from None
        check_size(sent, max_members=MAX_MEMBERS, max_values=MAX_VALUES)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def told(request: Request) -> Response:
            response = await answer(request)
            tenancy: TenantContext | None = getattr(request.app.state, "safegene_tenancy", None)
            if tenancy is not None:
                body = _in_store(tenancy.store.root).sub(STORE, response.body)
                asker: Principal | None = request.scope.get(SCOPE_KEY)
                roots = tenancy.store.rules.roots
                if roots and not (asker and asker.whole_server):
                    body = body.replace(_json(f" ({', '.join(map(str, roots))})"), b"")
                response.body = body
                response.headers["content-length"] = str(len(body))
            return response

        return told


@lru_cache
def _in_store(root: Path) -> re.Pattern[bytes]:
    """Finds the store's path in JSON, where it begins a path."""
    written = b"|".join(re.escape(_json(path)) for path in {str(root), os.path.realpath(root)})
    return re.compile(rb"(?:(?<![\w./-])|(?<=\\n))(?:" + written + rb")(?![\w-])")


def _json(text: str) -> bytes:
    """As our answers write it, without the quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "surrogateescape")
