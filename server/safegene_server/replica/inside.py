"""Requests of the server to its own app, from behind the access check.

For trying a revision that nobody else may use yet. Never for what comes from outside.
"""

from __future__ import annotations

from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_vllm.errors import ConfigError

TIMEOUT_S = 300.0


class Inside:
    """The app without its access check, once the server has built it."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """One request, as if it had been let through. Errors: ConfigError before the start."""
        if self.app is None:
            raise ConfigError("the server has not built its app yet; ask again after the start.")
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://inside", timeout=TIMEOUT_S
        ) as client:
            return await client.request(method, path, json=body)


class Inward:
    """ASGI middleware that changes nothing and remembers what lies behind it."""

    def __init__(self, app: ASGIApp, inside: Inside, whole: Any = None) -> None:
        """`whole` is the app that a route finds at `request.app`: it puts itself into the scope
        before any middleware, so a request from inside has to be given it."""
        self.app = app

        async def behind(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope if whole is None else {"app": whole, **scope}, receive, send)

        inside.app = behind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
