"""Puts vLLM's SageMaker adapter routes behind --api-key.

vLLM opens POST /adapters and DELETE /adapters/{name} together with runtime LoRA, outside the paths
its key guards. With a key set, they ask for it here. Without one, nothing changes.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.error_responses import error_response


class AdaptersNeedKey:
    """ASGI middleware; `keys` are the server's API keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guarded(scope) and not self._known(scope):
            response = error_response(401, "this route needs the server's API key.")
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @staticmethod
    def _guarded(scope: Scope) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return path.strip("/").split("/")[0] == "adapters" and scope["method"] != "OPTIONS"

    def _known(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        matches = [secrets.compare_digest(digest, known) for known in self.digests]
        return kind.lower() == "bearer" and any(matches)
