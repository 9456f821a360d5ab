"""The smallest world for `AccessMiddleware`: an echo app, keys, tenants, and two ways to call it.

`send_request` uses httpx as a client would; `asgi_post` is plain ASGI, to observe single chunks and
disconnects.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.types import Message, Receive, Scope, Send

from safegene_server.access.catalog import Catalog, Limits, Principal, Tenant, key_digest, make_view
from safegene_server.access.middleware import AccessMiddleware, AccessSettings, principal_of
from safegene_server.access.route_permissions import RULES

CHAT = "/v1/chat/completions"
NOW_S = 1_000_000.0
SERVE, READ, ADMIN = frozenset({"serve"}), frozenset({"read"}), frozenset({"admin"})
KEYS = {
    "acme": Principal("acme", SERVE, frozenset({"acme", "acme/support"}), "acme"),
    "plain": Principal("plain", SERVE, frozenset({"acme"})),
    "other": Principal("other", SERVE, frozenset({"other"}), "other"),
    "base": Principal("base", SERVE, frozenset(), base=True),
    "read": Principal("read", READ, frozenset({"*"})),
    "read-acme": Principal("read-acme", READ, frozenset({"acme"})),
    "admin": Principal("admin", ADMIN, frozenset({"*"})),
    "admin-acme": Principal("admin-acme", ADMIN, frozenset({"acme"})),
    "late": Principal("late", SERVE, frozenset({"acme"}), expires_at=NOW_S),
    "soon": Principal("soon", SERVE, frozenset({"acme"}), expires_at=NOW_S + 1),
    "nothing": Principal("nothing", frozenset(), frozenset({"*"})),
}
TENANTS = [
    Tenant("acme", "acme@7", frozenset({"acme@6"}), created=1),
    Tenant("acme/support", "acme/support@2"),
    Tenant("other", "other@1", limits=Limits(concurrent=1, requests_per_minute=3)),
    Tenant("metered", "metered@1", limits=Limits(tokens_per_minute=100)),
]
VIEW = make_view(
    keys={key_digest(f"sg-{name}"): key for name, key in KEYS.items()},
    tenants=TENANTS,
    base_models=("org/Base",),
    max_model_len=4096,
)


def echo_app() -> FastAPI:
    """App that echoes the requested model, as vLLM does, and the request it received."""
    app = FastAPI()

    async def echo(request: Request) -> dict[str, Any]:
        body = await request.body()
        principal = principal_of(request.scope)
        return {
            "model": json.loads(body)["model"] if body else None,
            "got": json.loads(body) if body else None,
            "length": request.headers.get("content-length"),
            "bytes": len(body),
            "principal": principal and principal.name,
        }

    for name in RULES:
        method, _, path = name.partition(" ")
        if method not in ("MOUNT", "WEBSOCKET"):
            app.add_api_route(path, echo, methods=[method])
    app.add_api_route("/v1/safegene/tenants", echo, methods=["GET", "POST"])
    app.add_api_route("/v1/safegene/whoami", echo, methods=["GET"])
    app.add_api_route("/unheard/of", echo, methods=["GET", "POST"])
    return app


def guarded(
    app: Callable[[Scope, Receive, Send], Awaitable[None]] | None = None, **more: Any
) -> AccessMiddleware:
    """The middleware before `app`, whose responses name the revision, as the engine does."""
    more = {"settings": AccessSettings(response_model="revision"), **more}
    return AccessMiddleware(app or echo_app(), Catalog(VIEW), now=lambda: NOW_S, **more)


def send_request(
    access: AccessMiddleware, method: str, path: str, key: str | None = None, **more: Any
) -> httpx.Response:
    headers = {"Authorization": f"Bearer sg-{key}"} if key else {}

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=access)
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return await client.request(
                method, path, headers={**headers, **more.pop("headers", {})}, **more
            )

    return asyncio.run(once())


def chat(access: AccessMiddleware, key: str, **body: Any) -> httpx.Response:
    return send_request(access, "POST", CHAT, key, json=body)


def rejected(response: httpx.Response, status: int, words: str = "") -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    if response.request.url.path.startswith("/v1/messages"):
        assert response.json()["type"] == "error" and set(error) == {"type", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
    assert words in error["message"]
    return str(error["message"])


def asgi_post(
    access: AccessMiddleware, key: str, body: dict[str, Any], receive: Receive | None = None
) -> Any:
    """One POST in plain ASGI: a coroutine, and the list of the messages that it sends."""
    sent: list[Message] = []
    request: list[Message] = [
        {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
    ]

    async def received() -> Message:
        if request:
            return request.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "query_string": b"",
        "headers": [
            (b"authorization", f"Bearer sg-{key}".encode()),
            (b"content-type", b"application/json"),
        ],
    }
    return access(scope, receive or received, send), sent
