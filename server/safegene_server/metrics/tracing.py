"""Spans of our own around a request, where vLLM's tracing is on: theirs become children of ours.

vLLM reads `traceparent` from the request's headers; it is handed on naming our span. Nothing is
traced unless OpenTelemetry is installed and vLLM was started with --otlp-traces-endpoint.
"""

from __future__ import annotations

from typing import Any

Headers = list[tuple[bytes, bytes]]
SPAN = "safegene.request"
_CONTEXT = (b"traceparent", b"tracestate")


class Span:
    """One request's span; `end` it once."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, *, tenant: str, served: str, outcome: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("safegene.tenant", tenant)
        self._span.set_attribute("safegene.revision", served)
        self._span.set_attribute("safegene.outcome", outcome)
        if outcome == "server_error":
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Tracing:
    """Makes spans by the process's tracer provider, which vLLM sets when its engine starts."""

    def __init__(self) -> None:
        """Errors: ImportError without OpenTelemetry."""
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._nothing = trace, Context()
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Headers) -> tuple[Span, Headers]:
        """A span below the caller's own, if the headers name one; the headers that name ours."""
        sent = {k.decode(): v.decode("latin-1") for k, v in headers if k in _CONTEXT}
        # Only what the request says: whatever else runs in this process is none of its business.
        parent = self._propagator.extract(sent, context=self._nothing)
        tracer = self._trace.get_tracer("safegene_server")
        span = tracer.start_span(SPAN, context=parent, kind=self._trace.SpanKind.SERVER)
        told: dict[str, str] = {}
        self._propagator.inject(told, context=self._trace.set_span_in_context(span, parent))
        kept = [(name, value) for name, value in headers if name not in _CONTEXT]
        return Span(span), kept + [(k.encode(), v.encode("latin-1")) for k, v in told.items()]


def tracing_of(args: Any) -> Tracing | None:
    """Tracing if vLLM's is on: its own start refuses an endpoint without OpenTelemetry."""
    return Tracing() if getattr(args, "otlp_traces_endpoint", None) else None
