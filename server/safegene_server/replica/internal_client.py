"""Internal requests of the server to its own app, past the access check.

For testing a revision before it is published. Never for requests of clients.
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
"""How long a canceled call waits for the app to end."""
ROUNDS, ROUND_S = 10, 0.01
"""vLLM's handlers run as separate tasks, and the app ends without waiting for one that it has
canceled. The engine aborts the request within the event loop's next few rounds."""


class InternalClient:
    """Client of the app without its access check, once the server has built the app."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """Send one request, without a timeout.

        Canceling the call disconnects like a client, and returns once the app has ended, after
        END_S at most: nothing of the request is left in the engine then.
        Errors: ConfigError before the start.
        """
        if self.app is None:
            raise ConfigError("the server has not built its app yet; try again after the start.")
        disconnected = asyncio.Event()
        running = asyncio.ensure_future(
            _send(_with_disconnect(self.app, disconnected), method, path, body)
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            disconnected.set()
            await _end(running, f"{method} {path}")
            raise


class CaptureApp:
    """ASGI middleware that captures the app it wraps for an InternalClient, and changes nothing."""

    def __init__(self, app: ASGIApp, internal_client: InternalClient, whole: Any = None) -> None:
        """Set `internal_client.app`.

        `whole` is the app that a route finds at `request.app`: it puts itself into the scope before
        any middleware, so an internal request needs it there.
        """
        self.app = app

        async def captured(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope if whole is None else {"app": whole, **scope}, receive, send)

        internal_client.app = captured

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def _send(
    app: ASGIApp, method: str, path: str, body: dict[str, Any] | None
) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://inside") as client:
        return await client.request(method, path, json=body)


def _with_disconnect(app: ASGIApp, disconnected: asyncio.Event) -> ASGIApp:
    """Wrap the app: its client disconnects when `disconnected` is set or the response ends."""

    async def disconnecting(scope: Scope, receive: Receive, send: Send) -> None:
        received = False

        async def receive_or_disconnect() -> Message:
            nonlocal received
            if received:
                await disconnected.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            received = not message.get("more_body", False)
            return message

        async def send_and_watch(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                disconnected.set()

        await app(scope, receive_or_disconnect, send_and_watch)

    return disconnecting


async def _end(running: asyncio.Task[httpx.Response], what: str) -> None:
    """Wait for an abandoned request to end, however often this is canceled."""
    clock = asyncio.get_running_loop().time
    until_s = clock() + END_S
    while not running.done() and clock() < until_s:
        with suppress(asyncio.CancelledError):
            await asyncio.wait({running}, timeout=until_s - clock())
    if not running.done():
        logger.error(
            "internal request %s did not end within %g s of being canceled; aborting it",
            what,
            END_S,
        )
        running.cancel()
    for _ in range(ROUNDS):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(ROUND_S)
