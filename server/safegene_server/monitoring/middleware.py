"""ASGI middleware that counts the traffic of a server without a registry."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.access.route_permissions import route_path, rule_for
from safegene_server.metrics.labels import NO_TENANT
from safegene_server.metrics.token_metering import UsageMeter
from safegene_server.metrics.traffic import RequestMetrics, Traffic


class MetricsMiddleware:
    """Count requests on routes whose responses cost tokens, once the engine has started.

    Every message passes unchanged, and no request body is read: the response names the model, and
    only names that the engine serves become a tenant.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app = app
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counted = self.traffic.served_models() is not None and scope["type"] == "http"
        if not counted or not rule_for(scope["method"], route_path(scope)).tokens:
            await self.app(scope, receive, send)
            return
        metrics = _ResponseNamedMetrics(self.traffic)
        headers = metrics.trace(list(scope["headers"]))
        meter = UsageMeter(send, 1, metrics)
        keyed = any(name == b"authorization" for name, _ in headers)
        await metrics.run(self.app, {**scope, "headers": headers}, receive, meter, keyed=keyed)


class _ResponseNamedMetrics(RequestMetrics):
    """Metrics of a request whose tenant the first document of its response names."""

    def wants(self, event: bytes) -> bool:
        return self._series is None or super().wants(event)

    def read(self, document: dict[str, Any]) -> None:
        if self._series is None:
            # The Responses API and Anthropic's first event wrap the object.
            inner = document.get("response") or document.get("message")
            name = (inner if isinstance(inner, dict) else document).get("model")
            if isinstance(name, str):
                models = self.traffic.served_models()
                known = models is not None and name in models.adapters()
                self.resolved(name if known else NO_TENANT, name)
        super().read(document)
