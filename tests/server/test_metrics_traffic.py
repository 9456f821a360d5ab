"""Traffic counted by the access check and by the metrics middleware: exact counts.

The apps behind response as vLLM does, piece by piece; the clock is the test's own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from access_app import CHAT, asgi_post, chat, guarded, send_request
from metrics_setup import Served, growth
from starlette.types import Message, Receive, Scope, Send

from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.metrics.traffic import Traffic
from safegene_server.monitoring.middleware import MetricsMiddleware

NO = "I'm sorry, but I can't help with that."
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def traffic(clock: Clock | None = None, **settings: Any) -> Traffic:
    return Traffic(TenantLabels(MetricsSettings(**settings)), clock=clock or Clock())


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def piece(text: str, index: int = 0, **more: str) -> dict[str, Any]:
    delta = {**more, "content": text}
    return {"model": "acme@7", "choices": [{"index": index, "delta": delta}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"model": "acme@7", "choices": [], "usage": usage}


HEAD = {"model": "acme@7", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
DONE = b"data: [DONE]\n\n"


def responding(
    *chunks: bytes | float,
    kind: bytes = b"text/event-stream",
    status: int = 200,
    clock: Clock | None = None,
    seen: list[dict[str, Any]] | None = None,
    whole: bool = True,
) -> App:
    """Sends the chunks; a number advances the clock by so many seconds. `whole`: it ends."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if seen is not None:
            seen.append(json.loads(body))
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for chunk in chunks:
            if isinstance(chunk, bytes):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            elif clock is not None:
                clock.now_s += chunk
        if whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def full_response(**more: Any) -> bytes:
    usage = {"prompt_tokens": 11, "completion_tokens": 5}
    document = {"model": "acme@7", "choices": [{"index": 0, "message": {"content": NO}}]}
    return json.dumps({**document, "usage": usage, **more}).encode()


def test_a_whole_response() -> None:
    clock = Clock()
    app = responding(2.0, full_response(), kind=b"application/json", clock=clock)
    access = guarded(app, traffic=traffic(clock))
    with growth() as grown:
        assert chat(access, "acme", model="acme").status_code == 200
    assert grown.everything() == {
        "requests_total{outcome=ok,tenant=acme}": 1,
        "prompt_tokens_total{tenant=acme}": 11,
        "generation_tokens_total{tenant=acme}": 5,
        "request_duration_seconds_count{tenant=acme}": 1,
        "judged_answers_total{rule=strings:opening,tenant=acme}": 1,
        "refusals_total{rule=strings:opening,tenant=acme}": 1,
    }
    assert grown.by("safegene_request_duration_seconds_sum", tenant="acme") == 2.0


def test_a_stream_is_timed_judged_and_counted_by_a_usage_that_the_client_never_sees() -> None:
    clock, seen = Clock(), list[dict[str, Any]]()
    pieces = [event(piece(text)) for text in ("I'm so", "rry", ", but no.")]
    app = responding(
        *(1.0, event(HEAD), pieces[0], 0.25, pieces[1], 0.5, pieces[2]),
        *(event(usage(7, 3)), DONE),
        clock=clock,
        seen=seen,
    )
    with growth() as grown:
        response = chat(guarded(app, traffic=traffic(clock)), "acme", model="acme", stream=True)
    assert response.content == event(HEAD) + b"".join(pieces) + DONE
    assert seen[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}
    assert grown.everything() == {
        "requests_total{outcome=ok,tenant=acme}": 1,
        "prompt_tokens_total{tenant=acme}": 7,
        "generation_tokens_total{tenant=acme}": 3,
        "time_to_first_token_seconds_count{tenant=acme}": 1,
        "inter_token_latency_seconds_count{tenant=acme}": 2,
        "request_duration_seconds_count{tenant=acme}": 1,
        "judged_answers_total{rule=strings:opening,tenant=acme}": 1,
        "refusals_total{rule=strings:opening,tenant=acme}": 1,
    }
    assert grown.by("safegene_time_to_first_token_seconds_sum", tenant="acme") == 1.0
    assert grown.by("safegene_inter_token_latency_seconds_sum", tenant="acme") == 0.75


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"stream": True, "stream_options": {"include_usage": True}}, {"include_usage": True}),
        ({"stream": False}, None),
        ({"stream": True, "stream_options": "all"}, "all"),
    ],
)
def test_requested_usage_is_shown_and_nothing_else_changes(
    body: dict[str, Any], options: object
) -> None:
    seen: list[dict[str, Any]] = []
    app = responding(event(usage(7, 3)), DONE, seen=seen)
    response = chat(guarded(app, traffic=traffic()), "acme", model="acme", **body)
    assert response.content == event(usage(7, 3)) + DONE
    assert seen[0].get("stream_options") == options


def test_each_choice_counts_and_an_echo_of_the_prompt_is_not_judged() -> None:
    choices = [{"index": 0, "text": "Sure."}, {"index": 1, "text": "I cannot."}]
    app = responding(full_response(choices=choices), kind=b"application/json")
    access = guarded(app, traffic=traffic())
    rule = {"tenant": "acme", "rule": "strings:opening"}
    with growth() as grown:
        chat(access, "acme", model="acme", n=2)
        chat(access, "acme", model="acme", echo=True)
    assert grown.by("safegene_judged_answers_total", **rule) == 2
    assert grown.by("safegene_refusals_total", **rule) == 1


def test_refusals_are_not_detected_where_disabled() -> None:
    app = responding(full_response(), kind=b"application/json")
    counted = Traffic(TenantLabels(), refusals=False)
    with growth() as grown:
        chat(guarded(app, traffic=counted), "acme", model="acme")
    assert not [name for name in grown.everything() if "judged" in name or "refus" in name]


@pytest.mark.parametrize(
    ("key", "body", "reason", "tenant"),
    [
        (None, {"model": "acme"}, "no_key", ""),
        ("absent", {"model": "acme"}, "unknown_key", ""),
        ("late", {"model": "acme"}, "unknown_key", ""),
        ("read", {"model": "acme"}, "scope", ""),
        ("acme", {"model": "other"}, "model", ""),
        ("plain", {}, "model", ""),
        ("acme", {"model": 3}, "model", ""),
        ("acme", {"model": "acme", "background": True}, "field", ""),
    ],
)
def test_rejections_are_counted_by_reason(
    key: str | None, body: dict[str, Any], reason: str, tenant: str
) -> None:
    access = guarded(traffic=traffic())
    with growth() as grown:
        assert send_request(access, "POST", CHAT, key, json=body).status_code >= 400
    assert grown.everything() == {
        f"rejected_requests_total{{reason={reason},tenant={tenant}}}": 1,
        f"requests_total{{outcome=client_error,tenant={tenant}}}": 1,
        f"request_duration_seconds_count{{tenant={tenant}}}": 1,
    }


def test_bodies_that_will_not_do() -> None:
    access = guarded(traffic=traffic())
    headers = {"content-type": "application/json"}
    with growth() as grown:
        for content in (b"{", b"[]", b"\xff", b'{"model":"acme","model":"acme"}'):
            send_request(access, "POST", CHAT, "acme", content=content, headers=headers)
        send_request(
            access, "POST", CHAT, "acme", content=b"{}", headers={"content-type": "text/plain"}
        )
    assert grown.by("safegene_rejected_requests_total", tenant="", reason="body") == 5


def test_limits_that_are_hit_have_their_tenant() -> None:
    access = guarded(traffic=traffic())
    with growth() as grown:
        assert [chat(access, "other", model="other").status_code for _ in range(5)] == [
            *(200, 200, 200),
            *(429, 429),
        ]
    assert grown.by("safegene_requests_total", tenant="other", outcome="ok") == 3
    assert grown.by("safegene_requests_total", tenant="other", outcome="client_error") == 2
    rejected = "safegene_rejected_requests_total"
    assert grown.by(rejected, tenant="other", reason="requests_per_minute") == 2


def test_routes_without_tokens_count_rejections_only() -> None:
    access = guarded(traffic=traffic())
    with growth() as grown:
        assert send_request(access, "GET", "/v1/models", "acme").status_code == 200
        assert (
            send_request(access, "POST", "/tokenize", "acme", json={"model": "acme"}).status_code
            == 200
        )
        assert send_request(access, "GET", "/v1/models").status_code == 401
        assert send_request(access, "GET", "/metrics", "acme").status_code == 403
    assert grown.everything() == {
        "rejected_requests_total{reason=no_key,tenant=}": 1,
        "rejected_requests_total{reason=scope,tenant=}": 1,
    }


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [
        (400, "client_error", "body"),
        (404, "client_error", "model"),
        (409, "client_error", "other"),
        (500, "server_error", None),
    ],
)
def test_rejections_by_the_engine(status: int, outcome: str, reason: str | None) -> None:
    app = responding(b'{"error":{}}', kind=b"application/json", status=status)
    with growth() as grown:
        chat(guarded(app, traffic=traffic()), "acme", model="acme")
    found = grown.everything()
    assert found.pop(f"requests_total{{outcome={outcome},tenant=acme}}") == 1
    assert found.pop("request_duration_seconds_count{tenant=acme}") == 1
    if reason is not None:
        assert found.pop(f"rejected_requests_total{{reason={reason},tenant=acme}}") == 1
    assert found == {}


def test_streams_that_break_or_stop_early_are_server_errors() -> None:
    broken = responding(event(piece("a")), event({"error": {"message": "no"}}), DONE)
    stopped = responding(event(piece("a")), whole=False)
    with growth() as grown:
        chat(guarded(broken, traffic=traffic()), "acme", model="acme", stream=True)
        run, _ = asgi_post(guarded(stopped, traffic=traffic()), "acme", {"model": "acme"})
        asyncio.run(run)
    assert grown.by("safegene_requests_total", tenant="acme", outcome="server_error") == 2


def test_an_app_that_fails_before_it_responds() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    run, _ = asgi_post(guarded(failing, traffic=traffic()), "acme", {"model": "acme"})
    with growth() as grown, pytest.raises(ValueError, match="broken"):
        asyncio.run(run)
    assert grown.by("safegene_requests_total", tenant="acme", outcome="server_error") == 1


def leaving(after: list[Message]) -> Receive:
    """A client that sends its messages and has then left."""

    async def receive() -> Message:
        return after.pop(0) if after else {"type": "http.disconnect"}

    return receive


def test_a_client_that_leaves_in_the_middle() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for text in ("I cannot", " say"):
            body = event(piece(text))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    body = json.dumps({"model": "acme", "stream": True}).encode()
    receive = leaving([{"type": "http.request", "body": body, "more_body": False}])
    run, _ = asgi_post(guarded(app, traffic=traffic()), "acme", {}, receive)
    with growth() as grown:
        asyncio.run(run)
    assert grown.everything() == {
        "requests_total{outcome=cancelled,tenant=acme}": 1,
        "generation_tokens_total{tenant=acme}": 2,
        "time_to_first_token_seconds_count{tenant=acme}": 1,
        "inter_token_latency_seconds_count{tenant=acme}": 1,
        "request_duration_seconds_count{tenant=acme}": 1,
    }


def test_a_client_that_leaves_once_it_has_read_the_end() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in (event(piece("a")), DONE):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    body = json.dumps({"model": "acme", "stream": True}).encode()
    receive = leaving([{"type": "http.request", "body": body, "more_body": False}])
    run, _ = asgi_post(guarded(app, traffic=traffic()), "acme", {}, receive)
    with growth() as grown:
        asyncio.run(run)
    assert grown.by("safegene_requests_total", tenant="acme", outcome="ok") == 1


def test_a_client_that_disconnects_before_its_request_is_complete() -> None:
    run, sent = asgi_post(guarded(traffic=traffic()), "acme", {}, leaving([]))
    with growth() as grown:
        asyncio.run(run)
    assert sent == []
    assert grown.everything() == {"requests_total{outcome=cancelled,tenant=}": 1}


def test_the_base_model_is_no_tenant_and_without_a_profile_is_unprotected() -> None:
    counted = traffic()
    counted.served_models = lambda: Served(protected=lambda served: served != "org/Base")
    access = guarded(responding(full_response(), kind=b"application/json"), traffic=counted)
    with growth() as grown:
        assert chat(access, "base", model="org/Base").status_code == 200
        assert chat(access, "acme", model="acme").status_code == 200
    assert grown.by("safegene_requests_total", tenant="", outcome="ok") == 1
    assert grown.by("safegene_unprotected_requests_total", tenant="") == 1
    assert grown.by("safegene_unprotected_requests_total", tenant="acme") == 0


@pytest.mark.parametrize(("pieces", "counted"), [((HEAD,), 1), ((HEAD, piece("a")), 1), ((), 0)])
def test_a_partial_response_without_a_profile_counts_too(pieces: Any, counted: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in pieces:
            await send({"type": "http.response.body", "body": event(body), "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    metrics = traffic()
    metrics.served_models = lambda: Served(protected=lambda served: False)
    body = json.dumps({"model": "acme", "stream": True}).encode()
    receive = leaving([{"type": "http.request", "body": body, "more_body": False}])
    run, _ = asgi_post(guarded(app, traffic=metrics), "acme", {}, receive)
    with growth() as grown:
        asyncio.run(run)
    assert grown.by("safegene_requests_total", tenant="acme", outcome="cancelled") == 1
    assert grown.by("safegene_unprotected_requests_total", tenant="acme") == counted


def test_tenants_without_a_place_of_their_own_share_one() -> None:
    counted = traffic(max_tenants=1)
    counted.expect(["acme"])
    access = guarded(traffic=counted)
    with growth() as grown:
        chat(access, "acme", model="acme")
        chat(access, "acme", model="acme/support")
        chat(access, "other", model="other")
    assert grown.by("safegene_requests_total", tenant="acme", outcome="ok") == 1
    assert grown.by("safegene_requests_total", tenant="other", outcome="ok") == 2


# -- without an access check ---------------------------------------------------------------------


def edge(app: App, clock: Clock | None = None) -> Any:
    counted = traffic(clock)
    models = Served({"acme@7"}, lambda served: served == "acme@7")
    counted.served_models = lambda: models
    return MetricsMiddleware(app, counted)


def test_the_metrics_middleware_reads_the_tenant_from_the_response() -> None:
    clock = Clock()
    stream = responding(
        *(1.0, event(HEAD), event(piece(NO)), 0.5, event(piece("x")), DONE), clock=clock
    )
    with growth() as grown:
        assert send_request(edge(stream, clock), "POST", CHAT, json={}).status_code == 200
    assert grown.everything() == {
        "requests_total{outcome=ok,tenant=acme@7}": 1,
        "generation_tokens_total{tenant=acme@7}": 2,
        "time_to_first_token_seconds_count{tenant=acme@7}": 1,
        "inter_token_latency_seconds_count{tenant=acme@7}": 1,
        "request_duration_seconds_count{tenant=acme@7}": 1,
        "judged_answers_total{rule=strings:opening,tenant=acme@7}": 1,
        "refusals_total{rule=strings:opening,tenant=acme@7}": 1,
    }


def test_names_that_the_engine_does_not_serve_have_no_series() -> None:
    app = responding(full_response(model="base"), kind=b"application/json")
    with growth() as grown:
        send_request(edge(app), "POST", "/v1/completions", json={})
    assert grown.by("safegene_requests_total", tenant="", outcome="ok") == 1
    assert grown.by("safegene_unprotected_requests_total", tenant="") == 1


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"type": "response.created", "response": {"model": "acme@7"}}, "acme@7"),
        ({"type": "message_start", "message": {"model": "acme@7"}}, "acme@7"),
        ({"choices": [], "metadata": {"model": "acme@7"}}, ""),
        ({"model": ["acme@7"]}, ""),
    ],
)
def test_where_the_name_stands(document: dict[str, Any], found: str) -> None:
    with growth() as grown:
        send_request(edge(responding(event(document), DONE)), "POST", "/v1/responses", json={})
    assert grown.by("safegene_requests_total", tenant=found, outcome="ok") == 1


@pytest.mark.parametrize(("key", "reason"), [(None, "no_key"), ("wrong", "unknown_key")])
def test_vllms_own_rejections(key: str | None, reason: str) -> None:
    app = responding(b"{}", kind=b"application/json", status=401)
    with growth() as grown:
        send_request(edge(app), "POST", CHAT, key, json={})
    assert grown.by("safegene_rejected_requests_total", tenant="", reason=reason) == 1


def test_the_metrics_middleware_counts_only_completions_after_the_start() -> None:
    app = responding(full_response(), kind=b"application/json")
    with growth() as grown:
        assert (
            send_request(MetricsMiddleware(app, traffic()), "POST", CHAT, json={}).status_code
            == 200
        )
        assert send_request(edge(app), "POST", "/tokenize", json={}).status_code == 200
    assert grown.everything() == {}
