"""`AccessMiddleware` during a request: chunks, limits, all endings, websockets, root paths."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from access_app import CHAT, SERVE, TENANTS, VIEW, asgi_post, chat, guarded, rejected, send_request
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from safegene_server.access.catalog import Catalog, Limits, Principal, Tenant, key_digest, make_view
from safegene_server.access.limits import Counters
from safegene_server.access.middleware import AccessMiddleware


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_chunks_pass_one_by_one_and_untouched() -> None:
    step = asyncio.Event()
    made: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kind = [(b"content-type", b"text/event-stream")]
        made.append({"type": "http.response.start", "status": 200, "headers": kind})
        await send(made[-1])
        for more in (True, True, False):
            await step.wait()
            step.clear()
            made.append({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": more})
            await send(made[-1])

    async def run() -> None:
        view = make_view(
            keys={key_digest("sg-m"): Principal("m", SERVE, frozenset({"metered"}), "metered")},
            tenants=TENANTS,
        )
        call, sent = asgi_post(AccessMiddleware(app, Catalog(view)), "m", {})
        task = asyncio.create_task(call)
        for count in (1, 2, 3, 4):
            await turns()
            assert sent[1:] == made[1:] and len(sent) == count
            assert sent[0] | {"headers": made[0]["headers"]} == made[0]
            step.set()
        await task

    asyncio.run(run())


def test_a_slot_is_held_to_the_end_of_the_stream_and_no_longer() -> None:
    release = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def lines() -> Any:
            yield "data: 1\n\n"
            await release.wait()
            yield "data: 2\n\n"

        await StreamingResponse(lines())(scope, receive, send)

    async def run() -> None:
        access = guarded(app)
        first, sent = asgi_post(access, "other", {"stream": True})
        task = asyncio.create_task(first)
        await turns()
        assert sent and access.counters.in_flight("other@1") == 1
        second, rejection = asgi_post(access, "other", {})
        await second
        assert rejection[0]["status"] == 429
        assert dict(rejection[0]["headers"])[b"retry-after"] == b"1"
        release.set()
        await task
        assert access.counters.in_flight("other@1") == 0
        third, response = asgi_post(access, "other", {})
        await third
        assert response[0]["status"] == 200

    asyncio.run(run())


def test_an_exception_and_a_cancelled_request_give_their_slot_back() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        access = guarded(broken)
        with pytest.raises(ZeroDivisionError):
            await asgi_post(access, "other", {})[0]
        assert not access.counters.running
        access = guarded(endless)
        task = asyncio.create_task(asgi_post(access, "other", {})[0])
        await turns()
        assert access.counters.in_flight("other@1") == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not access.counters.running
        assert access.counters.accounts["other"].running == 0

    asyncio.run(run())


def test_the_app_hears_that_its_client_left() -> None:
    heard: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([await receive(), await receive()])

    left: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"{}", "more_body": False},
    ]

    async def receive() -> Message:
        return left.pop()

    asyncio.run(asgi_post(guarded(app), "other", {}, receive)[0])
    assert heard[0]["body"] == b'{"model":"other@1"}'
    assert heard[1] == {"type": "http.disconnect"}


def test_a_client_that_disconnects_during_its_upload_is_not_counted() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    access = guarded(app)
    call, sent = asgi_post(access, "other", {}, receive)
    asyncio.run(call)
    assert sent == [] and access.counters.accounts == {}


@pytest.mark.parametrize(
    ("tenants", "keys", "status"),
    [([Tenant("acme", "acme@8")], VIEW.keys, 200), (TENANTS, {}, 401), ([], VIEW.keys, 404)],
)
def test_changes_during_an_upload_apply(tenants: Any, keys: Any, status: int) -> None:
    access = guarded()

    async def receive() -> Message:
        access.catalog.replace(make_view(keys=keys, tenants=tenants))
        return {"type": "http.request", "body": b'{"model": "acme"}', "more_body": False}

    call, sent = asgi_post(access, "acme", {}, receive)
    asyncio.run(call)
    assert sent[0]["status"] == status
    if status == 200:
        assert json.loads(sent[1]["body"])["model"] == "acme@8"


def test_several_completions_of_one_request_count_as_several() -> None:
    access = guarded()
    rejected(chat(access, "other", n=2), 400, "is for 2 completions")
    for path, body in ((CHAT, {"n": 3}), ("/v1/completions", {"prompt": ["a"] * 3})):
        response = send_request(access, "POST", path, "acme", json=body)
        assert response.status_code == 200
    assert access.counters.accounts["acme"].running == 0
    key = Principal("m", SERVE, frozenset({"metered"}), "metered")
    tenant = Tenant("metered", "metered@1", limits=Limits(requests_per_minute=4))
    view = make_view(keys={key_digest("sg-m"): key}, tenants=[tenant])
    access = guarded(counters=Counters(lambda: 0.0))
    access.catalog.replace(view)
    assert chat(access, "m", n=3).status_code == 200
    rejected(chat(access, "m", n=2), 429, "4 requests per minute")
    # To count words takes no response of the engine.
    assert send_request(access, "POST", "/tokenize", "m", json={"n": 9}).status_code == 200
    rejected(chat(access, "m"), 429, "4 requests per minute")


def test_requests_per_minute() -> None:
    now = [0.0]
    access = guarded(counters=Counters(lambda: now[0]))
    for _ in range(3):
        assert chat(access, "other").status_code == 200
    response = chat(access, "other")
    rejected(response, 429, "3 requests per minute")
    assert response.headers["retry-after"] == "60"
    assert chat(access, "acme").status_code == 200
    now[0] = 60.0
    assert chat(access, "other").status_code == 200


def test_tokens_per_minute_are_the_reported_usage() -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 40}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = json.dumps({"usage": usage}).encode()
        await send({"type": "http.response.body", "body": body})

    key = Principal("m", SERVE, frozenset({"metered"}), "metered")
    view = make_view(keys={key_digest("sg-m"): key}, tenants=TENANTS)
    access = AccessMiddleware(app, Catalog(view), counters=Counters(lambda: 0.0))
    assert chat(access, "m").status_code == 200
    assert access.counters.accounts["metered"].tokens.total == 90
    assert access.counters.accounts["metered"].reserved == 0
    rejected(chat(access, "m", prompt="x" * 40), 429, "100 tokens per minute")
    assert (
        send_request(access, "POST", "/tokenize", "m", json={"prompt": "x" * 40}).status_code == 200
    )
    assert access.counters.accounts["metered"].tokens.total == 90


def test_websockets_need_a_key_too() -> None:
    app = FastAPI()

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(str(websocket.scope["safegene.principal"].name))
        await websocket.close()

    client = TestClient(guarded(app))
    for headers in ({}, {"Authorization": "Bearer sg-acme"}, {"Authorization": "Bearer sg-no"}):
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/v1/realtime", headers=headers),
        ):
            raise AssertionError
    with client.websocket_connect(
        "/v1/realtime", headers={"Authorization": "Bearer sg-admin"}
    ) as socket:
        assert socket.receive_text() == "admin"


@pytest.mark.parametrize(
    ("extensions", "expected"),
    [
        ({"websocket.http.response": {}}, ["websocket.http.response.start"]),
        ({}, ["websocket.close"]),
        (None, ["websocket.close"]),
    ],
)
def test_a_websocket_is_rejected_in_http_where_its_server_supports_that(
    extensions: Any, expected: list[str]
) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "extensions": extensions}
    asyncio.run(guarded()(scope, receive, send))
    assert [message["type"] for message in sent][:1] == expected
    assert sent[0].get("status", 401) == 401
    assert sent[0].get("code", 1008) == 1008


def test_the_lifespan_passes_and_the_unknown_does_not() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def unused(*_: Any) -> Any:
        raise AssertionError

    asyncio.run(guarded(app)({"type": "lifespan"}, unused, unused))
    with pytest.raises(RuntimeError, match="telepathy"):
        asyncio.run(guarded(app)({"type": "telepathy"}, unused, unused))
    assert seen == ["lifespan"]


def test_a_root_path_changes_nothing() -> None:
    app = FastAPI(root_path="/api")

    @app.post(CHAT)
    async def response(request: Request) -> Any:
        return await request.json()

    access = guarded()
    app.add_middleware(
        AccessMiddleware,  # type: ignore[arg-type]
        catalog=access.catalog,
        now=access.now,
        settings=access.settings,
    )
    for path in (CHAT, f"/api{CHAT}"):
        served = send_request(app, "POST", path, "acme", json={})  # type: ignore[arg-type]
        assert served.json() == {"model": "acme@7"}
        rejected(send_request(app, "POST", path, json={}), 401)  # type: ignore[arg-type]
