"""Usage of requests that pass the access check: by tenant, key and day, in bounded memory."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import date
from typing import Any

import pytest
from access_app import CHAT, NOW_S, asgi_post, chat, guarded, rejected, send_request
from starlette.types import Receive, Scope, Send

from safegene_server.access.usage import DAY_S, UsageCounts
from safegene_server.registry import UsageRow

DAY = date(1970, 1, 12)
"""The day of NOW_S."""


def responding(status: int = 200, prompt: int = 7, completion: int = 3) -> Any:
    """App that responds with this usage."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        body = json.dumps({"model": "x", "usage": usage}).encode()
        kind = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": kind})
        await send({"type": "http.response.body", "body": body})

    return app


def rows(counts: UsageCounts) -> list[UsageRow]:
    return sorted(counts.take(), key=lambda row: (row.tenant, row.key))


def test_requests_are_counted_by_tenant_and_key() -> None:
    counts = UsageCounts()
    access = guarded(responding(), usage=counts)
    assert chat(access, "acme").status_code == 200
    assert chat(access, "acme", model="acme@6").status_code == 200
    assert chat(access, "acme", model="acme/support").status_code == 200
    assert chat(access, "plain", model="acme").status_code == 200
    assert chat(access, "base", model="org/Base").status_code == 200
    assert counts.requests == 5
    assert rows(counts) == [
        UsageRow(DAY, "acme", "acme", 2, 14, 6),
        UsageRow(DAY, "acme", "plain", 1, 7, 3),
        UsageRow(DAY, "acme/support", "acme", 1, 7, 3),
        UsageRow(DAY, "org/Base", "base", 1, 7, 3),
    ]
    assert rows(counts) == [] and counts.requests == 0


def test_rejected_requests_and_routes_without_tokens_are_not_counted() -> None:
    counts = UsageCounts()
    access = guarded(responding(), usage=counts)
    rejected(chat(access, "acme", model="other"), 404)
    rejected(chat(access, "acme", background=True), 400)
    rejected(chat(access, "absent"), 401)
    rejected(chat(access, "read"), 403)
    assert send_request(access, "POST", "/tokenize", "acme", json={}).status_code == 200
    assert send_request(access, "GET", "/v1/models", "acme").status_code == 200
    assert counts.requests == 0
    for _ in range(3):
        assert chat(access, "other").status_code == 200
    rejected(chat(access, "other"), 429)
    assert counts.requests == 3


@pytest.mark.parametrize("status", [400, 500])
def test_an_error_of_the_engine_is_a_request_without_tokens(status: int) -> None:
    counts = UsageCounts()
    assert chat(guarded(responding(status), usage=counts), "acme").status_code == status
    assert rows(counts) == [UsageRow(DAY, "acme", "acme", 1, 0, 0)]


def test_an_exception_is_a_request_without_tokens() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    counts = UsageCounts()
    with pytest.raises(ZeroDivisionError):
        asyncio.run(asgi_post(guarded(broken, usage=counts), "acme", {})[0])
    assert rows(counts) == [UsageRow(DAY, "acme", "acme", 1, 0, 0)]


def stream(*events: bytes, endless: bool = False) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if endless:
            await asyncio.Event().wait()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


DELTA = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
LAST = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\n\n'


def test_the_usage_of_a_stream_is_requested_and_hidden() -> None:
    counts = UsageCounts()
    access = guarded(stream(DELTA, LAST), usage=counts)
    response = send_request(access, "POST", CHAT, "acme", json={"stream": True})
    assert b"usage" not in response.content and response.content.startswith(DELTA)
    assert rows(counts) == [UsageRow(DAY, "acme", "acme", 1, 7, 5)]


def test_a_client_that_leaves_is_counted_with_what_it_got() -> None:
    counts = UsageCounts()

    async def run() -> None:
        access = guarded(stream(DELTA, DELTA, endless=True), usage=counts)
        task = asyncio.create_task(asgi_post(access, "acme", {"stream": True})[0])
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert rows(counts) == [UsageRow(DAY, "acme", "acme", 1, 0, 2)]


def test_a_response_without_usage_has_no_estimate() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kind = [(b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": b"\x00" * 400})

    counts = UsageCounts()
    chat(guarded(app, usage=counts), "acme")
    assert rows(counts) == [UsageRow(DAY, "acme", "acme", 1, 0, 0)]


def test_a_day_ends_at_midnight_in_utc() -> None:
    counts = UsageCounts()
    midnight = 12 * DAY_S
    for now_s in (NOW_S, midnight - 0.001, midnight, midnight + 1):
        counts.add("t", "k", 1, 1, now_s)
    assert [(row.day, row.requests) for row in counts.take()] == [
        (DAY, 2),
        (date(1970, 1, 13), 2),
    ]


def test_restored_rows_are_added_to_newer_counts() -> None:
    counts = UsageCounts()
    counts.add("t", "k", 1, 2, NOW_S)
    taken = counts.take()
    counts.add("t", "k", 10, 20, NOW_S)
    counts.restore(taken)
    assert counts.take() == [UsageRow(DAY, "t", "k", 2, 11, 22)]


def test_memory_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    counts = UsageCounts(max_rows=2)
    for key in "abcda":
        counts.add("t", key, 1, 1, NOW_S)
    assert counts.dropped == 2
    with caplog.at_level(logging.ERROR, "vllm.safegene_server"):
        taken = counts.take()
        counts.add("t", "c", 1, 1, NOW_S)
        counts.restore(taken)
        assert counts.dropped == 1 and counts.requests == 3
        counts.take()
        counts.take()
    assert {row.key: row.requests for row in taken} == {"a": 2, "b": 1}
    assert caplog.text.count("usage of 2 requests is lost: 2 rows") == 1
    assert caplog.text.count("usage of 1 requests is lost") == 1


def test_one_response_cannot_exceed_a_databases_integer() -> None:
    counts = UsageCounts()
    counts.add("t", "k", 10**30, 10**30, NOW_S)
    (row,) = counts.take()
    assert row.prompt_tokens == row.completion_tokens == 2**31 - 1
