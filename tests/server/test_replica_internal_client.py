"""Requests of the server to its own app: past what stands in front, as a route expects them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.replica import CaptureApp, InternalClient
from safegene_server.tenants import Prompt
from safegene_server.tenants.smoke_prompts import CHAT, generate_all
from safegene_vllm.errors import AdapterRejectedError, ConfigError

Handler = Callable[[Request], Coroutine[Any, Any, Any]]
Decorator = Callable[[Handler], Handler]


class Shut:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 401)(scope, receive, send)


def test_it_bypasses_the_outer_middleware_and_reaches_the_whole_app() -> None:
    app, inside = FastAPI(), InternalClient()
    app.state.word = "there"

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, str]:
        body = await request.json()
        return {"word": request.app.state.word, "body": body["x"]}

    app.add_middleware(CaptureApp, internal_client=inside, whole=app)
    app.add_middleware(Shut)

    async def call() -> None:
        with pytest.raises(ConfigError, match="not built its app"):
            await inside.call("GET", "/echo")
        app.middleware_stack = app.build_middleware_stack()
        response = await inside.call("POST", "/echo", {"x": "y"})
        assert (response.status_code, response.json()) == (200, {"word": "there", "body": "y"})

    asyncio.run(call())


def cancellable(handler: Handler) -> Handler:
    """As vLLM's `with_cancellation`: the handler is a task of its own, cancelled when the client
    disconnects and not when the request's own task is; its end is not awaited."""

    @functools.wraps(handler)
    async def wrapper(raw_request: Request) -> Any:
        async def listen() -> None:
            while (await raw_request.receive())["type"] != "http.disconnect":
                pass

        handling = asyncio.create_task(handler(raw_request))
        listening = asyncio.create_task(listen())
        both = {handling, listening}
        done, pending = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return handling.result() if handling in done else None

    return wrapper


def vllm_s_own() -> Decorator:
    pytest.importorskip("vllm")
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    found: Decorator = with_cancellation
    return found


class Slow:
    """An app whose engine holds a request until it is aborted; prompts "no" are rejected."""

    def __init__(self, decorate: Decorator = cancellable, *, stubborn: bool = False) -> None:
        self.app, self.inside = FastAPI(), InternalClient()
        self.begun: list[str] = []
        self.held: set[str] = set()
        self.all_begun = asyncio.Event()

        async def requested(raw_request: Request) -> Any:
            body = await raw_request.json()
            name = body["messages"][0]["content"]
            self.begun.append(name)
            self.held.add(name)
            if len(self.begun) == 3:
                self.all_begun.set()
            try:
                if name == "no":
                    await self.all_begun.wait()
                    self.held.discard(name)
                    return JSONResponse({"error": {"message": "too long"}}, 400)
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(60 if stubborn else 0)  # the abort is on its way
                self.held.discard(name)
                raise

        route = requested if stubborn else decorate(requested)
        self.app.add_api_route(CHAT, route, methods=["POST"])
        self.app.add_middleware(CaptureApp, internal_client=self.inside, whole=self.app)
        self.app.middleware_stack = self.app.build_middleware_stack()

    async def send(self, *names: str) -> list[str]:
        prompts = [Prompt(name, "benign") for name in names]
        return await generate_all(
            self.inside, "acme@1", prompts, concurrent=3, max_tokens=1, priority=None
        )


@asynccontextmanager
async def over_once_begun(slow: Slow, count: int, limit: asyncio.Timeout) -> AsyncIterator[None]:
    """The time of `limit` is over as soon as `count` requests have begun."""

    async def look() -> None:
        while len(slow.begun) < count:
            await asyncio.sleep(0.01)
        limit.reschedule(asyncio.get_running_loop().time())

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()


@pytest.mark.parametrize(
    "decorate",
    [
        pytest.param(lambda: cancellable, id="like vLLM's"),
        pytest.param(vllm_s_own, id="vLLM's", marks=pytest.mark.engine),
    ],
)
def test_what_is_given_up_leaves_nothing_in_the_engine(decorate: Callable[[], Decorator]) -> None:
    async def by_a_sibling() -> None:
        slow = Slow(decorate())
        with pytest.raises(AdapterRejectedError, match="too long"):
            await slow.send("a", "no", "b")
        assert sorted(slow.begun) == ["a", "b", "no"] and slow.held == set()

    async def by_a_timeout() -> None:
        slow = Slow(decorate())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300) as limit, over_once_begun(slow, 2, limit):
                await slow.send("a", "b")
        assert sorted(slow.begun) == ["a", "b"] and slow.held == set()

    async def cancelled_twice() -> None:
        slow = Slow(decorate())
        sending = asyncio.create_task(slow.send("a", "b", "c"))
        await slow.all_begun.wait()
        sending.cancel()
        await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert slow.held == set()

    for case in (by_a_sibling, by_a_timeout, cancelled_twice):
        asyncio.run(case())


def test_an_app_that_does_not_end_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("safegene_server.replica.internal_client.END_S", 0.05)

    async def call() -> None:
        slow = Slow(stubborn=True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300) as limit, over_once_begun(slow, 1, limit):
                await slow.send("a")

    asyncio.run(asyncio.wait_for(call(), 300))
    assert f"POST {CHAT} did not end within 0.05 s" in caplog.text
