"""Requests of the server to its own app: past what stands in front, as a route expects them."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.replica import Inside, Inward
from safegene_vllm.errors import ConfigError


class Shut:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 401)(scope, receive, send)


def test_it_goes_past_what_stands_in_front_and_finds_the_whole_app() -> None:
    app, inside = FastAPI(), Inside()
    app.state.word = "there"

    @app.post("/said")
    async def said(request: Request) -> dict[str, str]:
        body = await request.json()
        return {"word": request.app.state.word, "body": body["x"]}

    app.add_middleware(Inward, inside=inside, whole=app)
    app.add_middleware(Shut)

    async def ask() -> None:
        with pytest.raises(ConfigError, match="not built its app"):
            await inside.call("GET", "/said")
        app.middleware_stack = app.build_middleware_stack()
        answer = await inside.call("POST", "/said", {"x": "y"})
        assert (answer.status_code, answer.json()) == (200, {"word": "there", "body": "y"})

    asyncio.run(ask())
