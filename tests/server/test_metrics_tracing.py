"""Spans of our own, and vLLM's below them: headers handed on, attributes, and nothing unless on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from access_app import CHAT, chat, guarded, send_request
from metrics_setup import Served
from starlette.types import Receive, Scope, Send

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.tracing import Tracing, tracing_of
from safegene_server.metrics.traffic import Traffic
from safegene_server.monitoring.middleware import MetricsMiddleware

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID, CALLER_SPAN = int(CALLER.split("-")[1], 16), int(CALLER.split("-")[2], 16)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Exported spans, by the provider that vLLM would set."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    yield exporter
    provider.shutdown()


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    """Makes its span as vLLM's output processor does, from the headers alone."""
    while (await receive()).get("more_body"):
        pass
    sent = {k.decode(): v.decode() for k, v in scope["headers"]}
    received = {k: sent[k] for k in ("traceparent", "tracestate") if k in sent}
    context = TraceContextTextMapPropagator().extract(received)
    trace.get_tracer("vllm").start_span("llm_request", context=context).end()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    body = json.dumps({"model": "acme@7", "received": received}).encode()
    await send({"type": "http.response.body", "body": body, "more_body": False})


def traffic() -> Traffic:
    return Traffic(TenantLabels(), tracing=Tracing())


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def named(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    found = {span.name: span for span in spans.get_finished_spans()}
    assert len(found) == len(spans.get_finished_spans())
    return found


def test_the_engines_span_is_below_ours_and_ours_below_the_callers(
    spans: InMemorySpanExporter,
) -> None:
    access = guarded(engine, traffic=traffic())
    response = send_request(
        *(access, "POST", CHAT, "acme"),
        json={"model": "acme"},
        headers={"traceparent": CALLER, "tracestate": "vendor=1"},
    )
    assert response.json()["received"]["tracestate"] == "vendor=1"
    found = named(spans)
    ours, theirs = found["safegene.request"], found["llm_request"]
    assert {span.context.trace_id for span in found.values()} == {TRACE_ID}
    assert parent_of(ours) == CALLER_SPAN
    assert parent_of(theirs) == ours.context.span_id
    assert dict(ours.attributes or {}) == {
        "safegene.tenant": "acme",
        "safegene.revision": "acme@7",
        "safegene.outcome": "ok",
    }


def test_without_a_caller_ours_is_the_root(spans: InMemorySpanExporter) -> None:
    chat(guarded(engine, traffic=traffic()), "acme", model="acme")
    found = named(spans)
    assert found["safegene.request"].parent is None
    assert parent_of(found["llm_request"]) == found["safegene.request"].context.span_id


def test_a_caller_that_is_not_sampled_is_not_traced(spans: InMemorySpanExporter) -> None:
    headers = {"traceparent": CALLER[:-2] + "00"}
    access = guarded(engine, traffic=traffic())
    response = send_request(access, "POST", CHAT, "acme", json={"model": "acme"}, headers=headers)
    assert response.json()["received"]["traceparent"].endswith("-00")
    assert named(spans) == {}


def test_a_rejected_request_has_a_span(spans: InMemorySpanExporter) -> None:
    chat(guarded(engine, traffic=traffic()), "acme", model="other")
    (span,) = named(spans).values()
    assert (span.attributes or {})["safegene.outcome"] == "rejected: model"


def test_a_server_error_is_an_error_span(spans: InMemorySpanExporter) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        chat(guarded(failing, traffic=traffic()), "acme", model="acme")
    (span,) = named(spans).values()
    assert span.status.status_code is StatusCode.ERROR


def test_the_metrics_middleware_traces_too(spans: InMemorySpanExporter) -> None:
    counted = traffic()
    counted.served_models = lambda: Served({"acme@7"})
    response = send_request(MetricsMiddleware(engine, counted), "POST", CHAT, json={"x": 1})
    assert "traceparent" in response.json()["received"]
    found = named(spans)
    assert (found["safegene.request"].attributes or {})["safegene.tenant"] == "acme@7"


@pytest.mark.parametrize("args", [None, SimpleNamespace(otlp_traces_endpoint=None)])
def test_nothing_is_traced_unless_vllm_traces(args: Any, spans: InMemorySpanExporter) -> None:
    assert tracing_of(args) is None
    access = guarded(engine, traffic=Traffic(TenantLabels(), tracing=tracing_of(args)))
    headers = {"traceparent": CALLER}
    response = send_request(access, "POST", CHAT, "acme", json={"model": "acme"}, headers=headers)
    # The client's header is passed on unchanged: vLLM decides what to do with it.
    assert response.json()["received"] == {"traceparent": CALLER}
    assert set(named(spans)) == {"llm_request"}


def test_tracing_follows_vllms_own_option() -> None:
    assert isinstance(tracing_of(SimpleNamespace(otlp_traces_endpoint="http://c:4317")), Tracing)
