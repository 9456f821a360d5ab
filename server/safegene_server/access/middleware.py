"""Access check as ASGI middleware in front of the whole app.

A request passes by its route's rule, its key and the key's scopes; where it names a model, also by
the catalog and the limits, and then its body is passed on with the revision's name. Responses pass
chunk by chunk, with headers of ours and the requested name as their model. Where traffic or usage
is counted, usage is requested of every stream, and hidden from a client that did not request it.
Belongs inside a CORS middleware, which responds to preflights without a key, and outside of
anything that reads bodies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from starlette.responses import JSONResponse
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.access import body, models
from safegene_server.access.catalog import Catalog, Principal, View, key_digest
from safegene_server.access.limits import Counters
from safegene_server.access.rejection import RequestRejectedError, reject
from safegene_server.access.response import (
    REQUEST_ID,
    REVISION,
    RequestedName,
    ResponseHeaders,
    request_id,
)
from safegene_server.access.route_permissions import (
    LIST,
    MODELS,
    OPERATE,
    WEBSOCKET,
    Rule,
    needs_of_path,
    route_path,
    rule_for,
)
from safegene_server.access.usage import UsageCounts
from safegene_server.metrics.labels import NO_TENANT
from safegene_server.metrics.token_metering import UsageMeter, count_completions, estimate_prompt
from safegene_server.metrics.traffic import RequestMetrics, Traffic
from safegene_vllm.errors import ConfigError

SCOPE_KEY = "safegene.principal"
_USAGE_ON_REQUEST = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes whose streams report usage only on request."""


@dataclass(frozen=True)
class AccessSettings:
    """Settings of the access check.

    `public`: exact paths whose GET needs no key. `rejected_fields`: fields that no body may set; by
    default those that reach other tenants' data in the engine: responses stored under an id, work
    that outlives its request and limits, and blocks of another engine's cache. `usage_forced`:
    every stream reports its usage (--enable-force-include-usage). `response_model`: whether the
    `model` of a response is the name that was requested, or the revision that served it.
    """

    public: frozenset[str] = frozenset({"/health", "/ping"})
    max_body_bytes: int = 16 * 2**20
    max_depth: int = 64
    max_members: int = body.MAX_MEMBERS
    max_values: int = body.MAX_VALUES
    usage_forced: bool = False
    response_model: Literal["requested", "revision"] = "requested"
    rejected_fields: frozenset[str] = frozenset(
        {"background", "ec_transfer_params", "kv_transfer_params", "previous_response_id"}
    )

    def __post_init__(self) -> None:
        """Errors: ConfigError."""
        for path in sorted(self.public):
            if not path.startswith("/") or path.endswith("/") or "*" in path:
                raise ConfigError(f"public: {path!r} is not an exact path such as '/metrics'.")
        for name in ("max_body_bytes", "max_depth", "max_members", "max_values"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)!r}, expected 1 or more.")


class AccessMiddleware:
    """ASGI middleware. `now` returns Unix time in seconds.

    `traffic` counts passed and rejected requests, `usage` the tokens of each tenant and key; both
    are optional. `router` is the app's: a path without a route gets its 404 or redirect; without
    it, a 403.
    """

    def __init__(
        self,
        app: ASGIApp,
        catalog: Catalog,
        settings: AccessSettings | None = None,
        counters: Counters | None = None,
        now: Callable[[], float] = time.time,
        traffic: Traffic | None = None,
        router: Router | None = None,
        usage: UsageCounts | None = None,
    ) -> None:
        self.app = app
        self.catalog = catalog
        self.settings = settings or AccessSettings()
        self.counters = counters or Counters()
        self.now = now
        self.traffic = traffic
        self.router = router
        self.usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            raise RuntimeError(f"no rule for ASGI connections of type {scope['type']!r}")
        if scope["type"] == "http":
            identity = request_id(scope)
            headers = [pair for pair in scope["headers"] if pair[0] != REQUEST_ID]
            exposed = any(name == b"origin" for name, _ in headers)
            scope = {**scope, "headers": [*headers, (REQUEST_ID, identity)]}
            response = ResponseHeaders(send, {REQUEST_ID: identity}, exposed=exposed)
            send = response.send
        method = WEBSOCKET if scope["type"] == "websocket" else scope["method"]
        path = route_path(scope)
        rule = rule_for(method, path, self.settings.public)
        view = self.catalog.view
        counted = self.traffic is not None and rule.tokens
        metrics = RequestMetrics(self.traffic) if self.traffic and counted else None
        try:
            if rule.need == "public":
                principal = None
            else:
                principal = authenticate(view, scope["headers"], self.now())
                if rule is not OPERATE or not self._unserved(scope, principal):
                    check_scope(principal, rule)
            models_body = (
                _models_body(view, principal, path) if rule is LIST and principal else None
            )
            if scope["type"] == "http" and not rule.model:
                limit_bytes = self.settings.max_body_bytes
                receive = body.limit_body(scope["headers"], receive, limit_bytes)
        except RequestRejectedError as error:
            self._count(error, metrics)
            await reject(error, scope, receive, send)
            return
        if models_body is not None:
            await JSONResponse(models_body)(scope, receive, send)
        elif principal is not None and rule.model:
            await self._serve(rule, view, principal, metrics, scope, receive, response)
        else:
            await self.app({**scope, SCOPE_KEY: principal}, receive, send)

    async def _serve(
        self,
        rule: Rule,
        view: View,
        principal: Principal,
        metrics: RequestMetrics | None,
        scope: Scope,
        receive: Receive,
        response: ResponseHeaders,
    ) -> None:
        """Serve a request that names a model, from its body to the end of its response."""
        headers = list(scope["headers"])
        send = response.send
        tenant = NO_TENANT
        if metrics is not None:
            headers = metrics.trace(headers)
        try:
            raw = await body.read_body(headers, receive, self.settings.max_body_bytes)
            if raw is None:
                if metrics is not None:
                    metrics.cancelled()
                return
            document = body.parse(
                raw,
                self.settings.max_depth,
                max_members=self.settings.max_members,
                max_values=self.settings.max_values,
            )
            if view is not self.catalog.view:
                # A key may have been revoked, or a revision published, during the upload.
                view = self.catalog.view
                principal = authenticate(view, headers, self.now())
                check_scope(principal, rule)
            self._check_fields(document, principal)
            # No await from here to the reservation, so a resolved revision is in flight at once.
            target = models.resolve(view, principal, document.get("model"))
            requested = document.get("model") or target.account
            if target.account not in view.base_models:
                tenant = target.account
                response.extra[REVISION] = quote(target.served, safe="/@:+").encode()
            document["model"] = target.served
            metered = metrics is not None or self.usage is not None
            hide = metered and self._request_usage(route_path(scope), document)
            payload = body.encode(document)
            estimate = estimate_prompt(len(payload)) if rule.tokens else 0
            completions = count_completions(document) if rule.tokens else 1
            try:
                reservation = self.counters.admit(target, estimate, completions)
            finally:
                response.extra |= self.counters.headers(target)
        except RequestRejectedError as error:
            self._count(error, metrics, tenant)
            await reject(error, scope, receive, send)
            return
        if requested != target.served and self.settings.response_model == "requested":
            send = RequestedName(send, requested, target.served).send
        meter = UsageMeter(send, estimate, metrics, hide_usage=hide)
        inner = {**scope, "headers": body.headers_for(headers, payload), SCOPE_KEY: principal}
        replayed = body.replay(payload, receive)
        try:
            if metrics is not None:
                metrics.resolved(tenant, target.served, judge=not document.get("echo"))
                await metrics.run(self.app, inner, replayed, meter)
            elif estimate and (metered or target.limits.tokens_per_minute is not None):
                await self.app(inner, replayed, meter.send)
            else:
                await self.app(inner, replayed, send)
        finally:
            reservation.close(meter.tokens if rule.tokens else 0)
            if self.usage is not None and rule.tokens:
                self.usage.add(target.account, principal.name, *meter.counts, self.now())

    def _unserved(self, scope: Scope, principal: Principal) -> bool:
        """Return whether the app runs nothing for this request: it responds 404, 405 or 307."""
        if self.router is None or scope["type"] != "http":
            return False
        found = max((route.matches(scope)[0].value for route in self.router.routes), default=0)
        if found == Match.PARTIAL.value:
            return principal.scopes.issuperset(needs_of_path(route_path(scope)) or {"admin"})
        return found == Match.NONE.value

    def _count(
        self, error: RequestRejectedError, metrics: RequestMetrics | None, tenant: str = NO_TENANT
    ) -> None:
        if metrics is not None:
            metrics.rejected(error.reason, tenant)
        elif self.traffic is not None:
            self.traffic.rejected(error.reason, tenant)

    def _request_usage(self, path: str, document: dict[str, Any]) -> bool:
        """Request a stream's usage, in place; return whether to hide it from the client."""
        if (
            path not in _USAGE_ON_REQUEST
            or self.settings.usage_forced
            or document.get("stream") is not True
        ):
            return False
        options = document.get("stream_options") or {}
        if not isinstance(options, dict) or options.get("include_usage"):
            return False
        document["stream_options"] = {
            **options,
            "include_usage": True,
            "continuous_usage_stats": False,
        }
        return True

    def _check_fields(self, document: dict[str, Any], principal: Principal) -> None:
        """Errors: RequestRejectedError, 400; also for a priority reserved to administrators."""
        for name in sorted(self.settings.rejected_fields & document.keys()):
            if document[name]:
                raise RequestRejectedError(
                    400,
                    f"`{name}` is not available on this server; leave it out.",
                    param=name,
                    reason="field",
                )
        priority = document.get("priority")
        allowed = priority is None or (type(priority) is int and priority >= 0)
        if not allowed and not (principal.whole_server and "admin" in principal.scopes):
            raise RequestRejectedError(
                400,
                "`priority` is less than 0, or no whole number; below 0, which is before all "
                "others, takes a key with the scope `admin` for all tenants.",
                param="priority",
                reason="field",
            )


def authenticate(view: View, headers: body.HeaderList, now: float) -> Principal:
    """Return the principal of the request's key.

    The key is looked up by its hash, so that timing reveals nothing about existing keys.
    Errors: RequestRejectedError, 401, the same for an unknown and an expired key.
    """
    secret = _secret(headers)
    if not secret:
        raise _unauthorized(
            "this route needs a key: send one `Authorization: Bearer KEY` header, or one "
            "`x-api-key: KEY`; both only with the same key.",
            "no_key",
        )
    principal = view.keys.get(key_digest(secret))
    if principal is None or (principal.expires_at is not None and principal.expires_at <= now):
        raise _unauthorized(
            "the key is unknown, revoked or expired; ask the operator for another.",
            "unknown_key",
            ', error="invalid_token"',
        )
    return principal


def _secret(headers: body.HeaderList) -> bytes:
    """Return the key, sent as OpenAI's clients do, as Anthropic's, or both ways alike.

    Empty for none, for several, and for a header of another form.
    """
    bearer = [value for name, value in headers if name == b"authorization"]
    plain = [value.strip() for name, value in headers if name == b"x-api-key"]
    if len(bearer) > 1 or len(plain) > 1:
        return b""
    for value in bearer:
        kind, _, secret = value.partition(b" ")
        plain.append(secret.strip() if kind.lower() == b"bearer" else b"")
    return plain[0] if len(set(plain)) == 1 else b""


def check_scope(principal: Principal, rule: Rule) -> None:
    """Check the key's scopes: `admin` includes `read`; neither includes `serve`.

    Errors: RequestRejectedError, 403.
    """
    scopes = principal.scopes
    if rule.need == "key":
        return
    if rule.need not in scopes and not (rule.need == "read" and "admin" in scopes):
        held = ", ".join(sorted(scopes)) or "none"
        message = f"this route needs the scope `{rule.need}`; the key has: {held}."
        raise RequestRejectedError(403, message, reason="scope")
    if rule.whole_server and not principal.whole_server:
        message = "this route concerns all tenants; the key is for some of them."
        raise RequestRejectedError(403, message, reason="scope")


def principal_of(scope: Scope) -> Principal | None:
    """Return the request's principal; None on a public path, KeyError without the middleware."""
    found: Principal | None = scope[SCOPE_KEY]
    return found


def _models_body(view: View, principal: Principal, path: str) -> dict[str, Any]:
    """Errors: RequestRejectedError, 404."""
    if path == MODELS:
        return models.listing(view, principal)
    return models.describe(view, principal, path.removeprefix(f"{MODELS}/"))


def _unauthorized(message: str, reason: str, more: str = "") -> RequestRejectedError:
    headers = {"WWW-Authenticate": f'Bearer realm="safegene"{more}'}
    return RequestRejectedError(401, message, headers=headers, reason=reason)
