"""Requests of the server to its own app, from behind the access check.

For trying a revision that nobody else may use yet. Never for what comes from outside.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegene_vllm.errors import ConfigError

logger = logging.getLogger("vllm.safegene_server")
END_S = 30.0
"""How long a call that is given up waits for the app to end."""
ROUNDS, ROUND_S = 10, 0.01
"""vLLM's handlers run as tasks of their own, and the app ends without waiting for one that it has
cancelled. The engine is told to drop the request in the event loop's next few rounds."""


class InternalClient:
    """The app without its access check, once the server has built it."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """One request, as if it had been let through. It takes as long as it takes.

        Whoever cancels this leaves as a client does that hangs up, and is let go once the app has
        ended, after END_S at most: nothing of the request is left in the engine then.
        Errors: ConfigError before the start.
        """
        if self.app is None:
            raise ConfigError("the server has not built its app yet; ask again after the start.")
        gone = asyncio.Event()
        asking = asyncio.ensure_future(_ask(_left_by(self.app, gone), method, path, body))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            gone.set()
            await _end(asking, f"{method} {path}")
            raise


class CaptureApp:
    """ASGI middleware that changes nothing and remembers what lies behind it."""

    def __init__(self, app: ASGIApp, inside: InternalClient, whole: Any = None) -> None:
        """`whole` is the app that a route finds at `request.app`: it puts itself into the scope
        before any middleware, so a request from inside has to be given it."""
        self.app = app

        async def behind(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope if whole is None else {"app": whole, **scope}, receive, send)

        inside.app = behind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def _ask(app: ASGIApp, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://inside") as client:
        return await client.request(method, path, json=body)


def _left_by(app: ASGIApp, gone: asyncio.Event) -> ASGIApp:
    """The app with a client that disconnects once `gone` is set; the transport's own stays."""

    async def left(scope: Scope, receive: Receive, send: Send) -> None:
        whole = False

        async def hear() -> Message:
            nonlocal whole
            if whole:
                await gone.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            whole = not message.get("more_body", False)
            return message

        async def say(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                gone.set()

        await app(scope, hear, say)

    return left


async def _end(asking: asyncio.Task[httpx.Response], what: str) -> None:
    """Wait for a request that nobody waits for any more, however often this is cancelled."""
    clock = asyncio.get_running_loop().time
    until_s = clock() + END_S
    while not asking.done() and clock() < until_s:
        with suppress(asyncio.CancelledError):
            await asyncio.wait({asking}, timeout=until_s - clock())
    if not asking.done():
        logger.error("SafeGene: %s did not end within %g s of being given up", what, END_S)
        asking.cancel()
    for _ in range(ROUNDS):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(ROUND_S)
