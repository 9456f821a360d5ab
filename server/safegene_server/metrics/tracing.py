"""OpenTelemetry span of a request, the parent of vLLM's own where vLLM's tracing is on.

vLLM reads `traceparent` from the request's headers, which are passed on with our span. Nothing is
traced unless OpenTelemetry is installed and vLLM was started with --otlp-traces-endpoint.
"""

from __future__ import annotations

from typing import Any

Headers = list[tuple[bytes, bytes]]
SPAN = "safegene.request"
_CONTEXT = (b"traceparent", b"tracestate")


class Span:
    """Span of one request; `end` it once."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, *, tenant: str, served: str, outcome: str) -> None:
        """Set the attributes and end the span."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("safegene.tenant", tenant)
        self._span.set_attribute("safegene.revision", served)
        self._span.set_attribute("safegene.outcome", outcome)
        if outcome == "server_error":
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Tracing:
    """Spans of the process's tracer provider, which vLLM sets when its engine starts."""

    def __init__(self) -> None:
        """Errors: ImportError without OpenTelemetry."""
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._empty = trace, Context()
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Headers) -> tuple[Span, Headers]:
        """Start a span below the client's own, if any; return it and the headers that name it."""
        sent = {k.decode(): v.decode("latin-1") for k, v in headers if k in _CONTEXT}
        # Of the request only: the current context may be another request's.
        parent = self._propagator.extract(sent, context=self._empty)
        tracer = self._trace.get_tracer("safegene_server")
        span = tracer.start_span(SPAN, context=parent, kind=self._trace.SpanKind.SERVER)
        injected: dict[str, str] = {}
        self._propagator.inject(injected, context=self._trace.set_span_in_context(span, parent))
        others = [(name, value) for name, value in headers if name not in _CONTEXT]
        ours = [(name.encode(), value.encode("latin-1")) for name, value in injected.items()]
        return Span(span), others + ours


def tracing_of(args: Any) -> Tracing | None:
    """Return tracing if vLLM's is on, which requires OpenTelemetry."""
    return Tracing() if getattr(args, "otlp_traces_endpoint", None) else None
