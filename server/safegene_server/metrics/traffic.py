"""What is counted of requests: outcomes, tokens, times, refusals in answers, limits that were hit.

For the access check, or `Edge` in a server without one, to tell of each request. A series is looked
up once per tenant and process; a request costs a few additions, a piece of a stream one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope

from safegene_server.metrics import definitions
from safegene_server.metrics.labels import NOBODY, TenantLabels
from safegene_server.metrics.refusal_detection import RefusalDetector
from safegene_server.metrics.token_metering import UsageMeter
from safegene_server.metrics.tracing import Span, Tracing

_BEHIND = {401: "unknown_key", 403: "scope", 404: "model"}
_BODY = (400, 411, 413, 415, 422)


class _Of:
    """The series of one tenant label, all of them there from the first moment on."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.outcomes = {o: definitions.REQUESTS.labels(label, o) for o in definitions.OUTCOMES}
        self.prompt = definitions.PROMPT_TOKENS.labels(label)
        self.generation = definitions.GENERATION_TOKENS.labels(label)
        self.first = definitions.TIME_TO_FIRST_TOKEN.labels(label)
        self.gaps = definitions.INTER_TOKEN_LATENCY.labels(label)
        self.duration = definitions.REQUEST_DURATION.labels(label)
        self.judged = definitions.JUDGED_ANSWERS.labels(label, definitions.RULE)
        self.refusals = definitions.REFUSALS.labels(label, definitions.RULE)
        self.unprotected = definitions.UNPROTECTED_REQUESTS.labels(label)


class Traffic:
    """One process's traffic. `clock` is in seconds.

    Set once the engine runs: `protected(served)` says whether what answers under a name has a
    profile, `adapters()` has the names under which adapters are served.
    """

    def __init__(
        self,
        labels: TenantLabels,
        *,
        refusals: bool = True,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.labels = labels
        self.refusals = refusals
        self.tracing = tracing
        self.clock = clock
        self.protected: Callable[[str], bool] | None = None
        self.adapters: Callable[[], Container[str]] | None = None
        self._of: dict[str, _Of] = {}

    def of(self, tenant: str) -> _Of:
        label = self.labels.label(tenant)
        found = self._of.get(label)
        if found is None:
            found = self._of[label] = _Of(label)
        return found

    def expect(self, tenants: Iterable[str]) -> None:
        """Tenants that exist, in the order of their publishing: their series begin at 0."""
        for tenant in tenants:
            self.of(tenant)

    def rejected(self, reason: str, tenant: str = NOBODY) -> None:
        """A request, of any route, that went no further."""
        definitions.REJECTED.labels(self.labels.label(tenant), reason).inc()


class RequestMetrics:
    """One request for an answer, from its first byte to its last: a `Watch` of its meter."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.begun_s = traffic.clock()
        self.tenant = NOBODY
        self.served = ""
        self.left = False
        """The client has gone before its answer was complete."""
        self._of: _Of | None = None
        self._openings = RefusalDetector() if traffic.refusals else None
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._spoken = 0
        self._span: Span | None = None

    def trace(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers to hand on, in a span of our own where tracing is on."""
        if self.traffic.tracing is None:
            return headers
        self._span, headers = self.traffic.tracing.begin(headers)
        return headers

    def leads_to(self, tenant: str, served: str, *, judge: bool = True) -> None:
        """Whose request it is, and the name that the engine answers it under.

        `judge`: whether the answer begins with the answer, and not with an echo of the prompt.
        """
        self.tenant, self.served = tenant, served
        self._of = self.traffic.of(tenant)
        if not judge:
            self._openings = None

    async def follow(
        self, app: ASGIApp, scope: Scope, receive: Receive, meter: UsageMeter, *, keyed: bool = True
    ) -> None:
        """Have `app` answer through the meter, to the end, however it ends.

        `keyed`: the request carried a key of some kind.
        """

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not meter.complete:
                self.left = True
            return message

        try:
            await app(scope, heard, meter.send)
        finally:
            self._ended(meter, keyed)

    # -- while the answer goes out ---------------------------------------------------------------

    def wants(self, event: bytes) -> bool:
        return self._openings is not None and self._openings.wants(event)

    def read(self, document: dict[str, Any]) -> None:
        if self._openings is not None:
            self._openings.read(document)

    def spoke(self, event: bytes) -> None:
        """Times a piece of the answer; the pieces before and after the text do not count."""
        if b'"delta"' not in event and b'"text"' not in event:
            return
        now_s = self.traffic.clock()
        of = self._of or self.traffic.of(NOBODY)
        if self._first_s is None:
            self._first_s = now_s
            of.first.observe(now_s - self.begun_s)
        if b'"role":"assistant"' in event:
            # Sent together with the first token, by a host that has more to say at once.
            return
        if self._last_s is not None:
            of.gaps.observe(now_s - self._last_s)
        self._last_s = now_s
        self._spoken += 1

    # -- the end ---------------------------------------------------------------------------------

    def refused(self, reason: str, tenant: str = NOBODY) -> None:
        """It went no further than the access check."""
        self.traffic.rejected(reason, tenant)
        of = self.traffic.of(tenant)
        of.outcomes["client_error"].inc()
        of.duration.observe(self.traffic.clock() - self.begun_s)
        if self._span is not None:
            self._span.end(tenant=tenant, served="", outcome=f"rejected: {reason}")

    def gone(self) -> None:
        """The client left before its request was whole."""
        self.traffic.of(NOBODY).outcomes["cancelled"].inc()
        if self._span is not None:
            self._span.end(tenant=NOBODY, served="", outcome="cancelled")

    def _ended(self, meter: UsageMeter, keyed: bool) -> None:
        meter.settle()
        of = self._of or self.traffic.of(NOBODY)
        outcome = self._outcome(meter)
        of.outcomes[outcome].inc()
        of.duration.observe(self.traffic.clock() - self.begun_s)
        if outcome == "client_error" and meter.status is not None:
            reason = "no_key" if meter.status == 401 and not keyed else _reason(meter.status)
            definitions.REJECTED.labels(of.label, reason).inc()
        if meter.status is not None and meter.status < 400:
            self._count(of, meter, outcome)
        if self._span is not None:
            self._span.end(tenant=self.tenant, served=self.served, outcome=outcome)

    def _outcome(self, meter: UsageMeter) -> str:
        status = meter.status
        if status is not None and status >= 400:
            return "client_error" if status < 500 else "server_error"
        if meter.broken:
            return "server_error"
        if self.left or meter.left:
            return "cancelled"
        return "ok" if meter.complete else "server_error"

    def _count(self, of: _Of, meter: UsageMeter, outcome: str) -> None:
        of.prompt.inc(meter.prompt or 0)
        of.generation.inc(meter.completion or self._spoken)
        if self._openings is not None:
            judged, refusals = self._openings.judged(ended=outcome == "ok")
            of.judged.inc(judged)
            of.refusals.inc(refusals)
        protected = self.traffic.protected
        # What a client has read of an answer that broke off was as unprotected as the whole.
        spoken = outcome == "ok" or self._first_s is not None or meter.completion > 0
        if spoken and protected is not None and not protected(self.served):
            of.unprotected.inc()


def _reason(status: int) -> str:
    """Why the app behind refused, as far as its status tells."""
    return _BEHIND.get(status) or ("body" if status in _BODY else "other")
