"""`Edge`: counts the traffic of a server without a registry, in front of the whole app.

For tenants of the command line. Lets everything pass as it is. No body is read for it: whose
request it was is what the answer says, and only names that the engine serves count.
"""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.access.route_permissions import route_path, rule_for
from safegene_server.metrics.labels import NOBODY
from safegene_server.metrics.token_metering import UsageMeter
from safegene_server.metrics.traffic import RequestMetrics, Traffic


class MetricsMiddleware:
    """ASGI middleware. Counts once `traffic` knows what the engine serves, until then nothing.

    Routes whose answers cost tokens are those of the access check's table.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app = app
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.traffic.adapters is None or scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not rule_for(scope["method"], route_path(scope)).tokens:
            await self.app(scope, receive, send)
            return
        exchange = _Unnamed(self.traffic)
        headers = exchange.trace(list(scope["headers"]))
        meter = UsageMeter(send, 1, exchange)
        keyed = any(name == b"authorization" for name, _ in headers)
        inner = {**scope, "headers": headers}
        await exchange.follow(self.app, inner, receive, meter, keyed=keyed)


class _Unnamed(RequestMetrics):
    """A request whose tenant is learned from the first document of its answer."""

    def wants(self, event: bytes) -> bool:
        return self._of is None or super().wants(event)

    def read(self, document: dict[str, Any]) -> None:
        if self._of is None:
            # The Responses API and Anthropic's first event wrap what they are about.
            inner = document.get("response") or document.get("message")
            name = (inner if isinstance(inner, dict) else document).get("model")
            if isinstance(name, str):
                known = self.traffic.adapters is not None and name in self.traffic.adapters()
                self.leads_to(name if known else NOBODY, name)
        super().read(document)
