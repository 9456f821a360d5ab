"""Metrics of requests: outcomes, tokens, times, refusals in completions, limits that were hit.

The access check, or `MetricsMiddleware` in a server without one, reports each request here. A
series is looked up once per tenant and process; a request costs a few additions, a chunk of a
stream one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope

from safegene_server.metrics import definitions
from safegene_server.metrics.labels import NO_TENANT, TenantLabels
from safegene_server.metrics.refusal_detection import RefusalDetector
from safegene_server.metrics.token_metering import UsageMeter
from safegene_server.metrics.tracing import Span, Tracing

_REASONS = {401: "unknown_key", 403: "scope", 404: "model"}
_BODY = (400, 411, 413, 415, 422)


class ServedModels(Protocol):
    """Served names of the engine (safegene_server.verifier.Verifier)."""

    def protected(self, served: str) -> bool:
        """Return whether the adapter or base model served under this name has a profile."""
        ...

    def adapters(self) -> Container[str]:
        """Return the served names of adapters."""
        ...


class TenantSeries:
    """Series of one tenant label, all of them exported from the start."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.outcomes = {o: definitions.REQUESTS.labels(label, o) for o in definitions.OUTCOMES}
        self.prompt = definitions.PROMPT_TOKENS.labels(label)
        self.generation = definitions.GENERATION_TOKENS.labels(label)
        self.first = definitions.TIME_TO_FIRST_TOKEN.labels(label)
        self.gaps = definitions.INTER_TOKEN_LATENCY.labels(label)
        self.duration = definitions.REQUEST_DURATION.labels(label)
        self.judged = definitions.JUDGED_COMPLETIONS.labels(label, definitions.RULE)
        self.refusals = definitions.REFUSALS.labels(label, definitions.RULE)
        self.unprotected = definitions.UNPROTECTED_REQUESTS.labels(label)


class Traffic:
    """Traffic of one process. `clock` is in seconds.

    `served_models()` is None until the engine has started.
    """

    def __init__(
        self,
        labels: TenantLabels,
        *,
        refusals: bool = True,
        tracing: Tracing | None = None,
        served_models: Callable[[], ServedModels | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.labels = labels
        self.refusals = refusals
        self.tracing = tracing
        self.served_models = served_models
        self.clock = clock
        self._series: dict[str, TenantSeries] = {}

    def series(self, tenant: str) -> TenantSeries:
        """Return the series of a tenant's label."""
        label = self.labels.label(tenant)
        found = self._series.get(label)
        if found is None:
            found = self._series[label] = TenantSeries(label)
        return found

    def expect(self, tenants: Iterable[str]) -> None:
        """Start the series of existing tenants at 0, in the order of their publishing."""
        for tenant in tenants:
            self.series(tenant)

    def rejected(self, reason: str, tenant: str = NO_TENANT) -> None:
        """Count a request, of any route, that was rejected."""
        definitions.REJECTED.labels(self.labels.label(tenant), reason).inc()


class RequestMetrics:
    """Metrics of one request, from its first byte to its last: an observer of its meter."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.started_s = traffic.clock()
        self.tenant = NO_TENANT
        self.served = ""
        self.disconnected = False
        """The client disconnected before its response was complete."""
        self._series: TenantSeries | None = None
        self._detector = RefusalDetector() if traffic.refusals else None
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._chunks = 0
        self._span: Span | None = None

    def trace(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers to pass on, in a span of our own where tracing is on."""
        if self.traffic.tracing is None:
            return headers
        self._span, headers = self.traffic.tracing.begin(headers)
        return headers

    def resolved(self, tenant: str, served: str, *, judge: bool = True) -> None:
        """Note the tenant, and the name that the engine serves the request under.

        `judge`: whether the response begins with the completion, and not with an echoed prompt.
        """
        self.tenant, self.served = tenant, served
        self._series = self.traffic.series(tenant)
        if not judge:
            self._detector = None

    async def run(
        self, app: ASGIApp, scope: Scope, receive: Receive, meter: UsageMeter, *, keyed: bool = True
    ) -> None:
        """Have `app` respond through the meter, and count the request however it ends.

        `keyed`: the request carried a key of some kind.
        """

        async def observed() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not meter.complete:
                self.disconnected = True
            return message

        try:
            await app(scope, observed, meter.send)
        finally:
            self._ended(meter, keyed)

    # -- during the response ---------------------------------------------------------------------

    def wants(self, event: bytes) -> bool:
        return self._detector is not None and self._detector.wants(event)

    def read(self, document: dict[str, Any]) -> None:
        if self._detector is not None:
            self._detector.read(document)

    def on_chunk(self, event: bytes) -> None:
        """Time a chunk of the completion; events before and after the text do not count."""
        if b'"delta"' not in event and b'"text"' not in event:
            return
        now_s = self.traffic.clock()
        series = self._series or self.traffic.series(NO_TENANT)
        if self._first_s is None:
            self._first_s = now_s
            series.first.observe(now_s - self.started_s)
        if b'"role":"assistant"' in event:
            # vLLM sends this event together with the first token.
            return
        if self._last_s is not None:
            series.gaps.observe(now_s - self._last_s)
        self._last_s = now_s
        self._chunks += 1

    # -- the end ---------------------------------------------------------------------------------

    def rejected(self, reason: str, tenant: str = NO_TENANT) -> None:
        """Count a request that the access check rejected."""
        self.traffic.rejected(reason, tenant)
        series = self.traffic.series(tenant)
        series.outcomes["client_error"].inc()
        series.duration.observe(self.traffic.clock() - self.started_s)
        if self._span is not None:
            self._span.end(tenant=tenant, served="", outcome=f"rejected: {reason}")

    def cancelled(self) -> None:
        """Count a client that disconnected before its request was complete."""
        self.traffic.series(NO_TENANT).outcomes["cancelled"].inc()
        if self._span is not None:
            self._span.end(tenant=NO_TENANT, served="", outcome="cancelled")

    def _ended(self, meter: UsageMeter, keyed: bool) -> None:
        meter.settle()
        series = self._series or self.traffic.series(NO_TENANT)
        outcome = self._outcome(meter)
        series.outcomes[outcome].inc()
        series.duration.observe(self.traffic.clock() - self.started_s)
        if outcome == "client_error" and meter.status is not None:
            reason = "no_key" if meter.status == 401 and not keyed else _reason(meter.status)
            definitions.REJECTED.labels(series.label, reason).inc()
        if meter.status is not None and meter.status < 400:
            self._count(series, meter, outcome)
        if self._span is not None:
            self._span.end(tenant=self.tenant, served=self.served, outcome=outcome)

    def _outcome(self, meter: UsageMeter) -> str:
        status = meter.status
        if status is not None and status >= 400:
            return "client_error" if status < 500 else "server_error"
        if meter.broken:
            return "server_error"
        if self.disconnected or meter.disconnected:
            return "cancelled"
        return "ok" if meter.complete else "server_error"

    def _count(self, series: TenantSeries, meter: UsageMeter, outcome: str) -> None:
        series.prompt.inc(meter.prompt or 0)
        series.generation.inc(meter.completion or self._chunks)
        if self._detector is not None:
            judged, refusals = self._detector.judged(ended=outcome == "ok")
            series.judged.inc(judged)
            series.refusals.inc(refusals)
        models = self.traffic.served_models()
        # The part of a broken response that a client has read was as unprotected as the whole.
        sent = outcome == "ok" or self._first_s is not None or meter.completion > 0
        if sent and models is not None and not models.protected(self.served):
            series.unprotected.inc()


def _reason(status: int) -> str:
    """Return why the app rejected the request, as far as its status says."""
    return _REASONS.get(status) or ("body" if status in _BODY else "other")
