"""`Access`: pure ASGI, in front of the whole app; nothing passes that is not let through here.

A request is let through by its route's rule, its key and its key's scopes; where it names a model,
also by the catalog and the limits, and then its body goes on with the revision's name in it. An
answer passes untouched, chunk by chunk, but for one event: where traffic is counted, every stream
is asked for its usage, and a client that did not ask is not shown it. Belongs inside a CORS
middleware, which answers preflights without a key, and outside of whatever reads bodies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.access import body, models
from safegene_server.access.catalog import Catalog, Principal, View, key_digest
from safegene_server.access.limits import Counters
from safegene_server.access.rejection import RequestRejectedError, reject
from safegene_server.access.route_permissions import (
    LIST,
    MODELS,
    WEBSOCKET,
    Rule,
    route_path,
    rule_for,
)
from safegene_server.metrics.labels import NOBODY
from safegene_server.metrics.token_metering import UsageMeter, count_answers, estimate_prompt
from safegene_server.metrics.traffic import RequestMetrics, Traffic
from safegene_vllm.errors import ConfigError

SCOPE_KEY = "safegene.principal"
_TELL_USAGE = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes whose streams tell their usage only if they are asked to."""


@dataclass(frozen=True)
class AccessSettings:
    """`public`: exact paths whose GET needs no key. `refused_fields`: what no body may ask for.

    The defaults of `refused_fields` reach what other tenants left in the engine: answers kept under
    an id, work that outlives its request and its limits, and blocks of another engine's cache.
    `usage_told`: every stream tells its usage to its client (--enable-force-include-usage).
    """

    public: frozenset[str] = frozenset({"/health", "/ping"})
    max_body_bytes: int = 16 * 2**20
    max_depth: int = 64
    max_members: int = body.MAX_MEMBERS
    max_values: int = body.MAX_VALUES
    usage_told: bool = False
    refused_fields: frozenset[str] = frozenset(
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


class Access:
    """ASGI middleware. `counters` tells what is in flight; `now` gives Unix time in seconds.

    `traffic` counts what passes and what is refused; without it nothing is counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        catalog: Catalog,
        settings: AccessSettings | None = None,
        counters: Counters | None = None,
        now: Callable[[], float] = time.time,
        traffic: Traffic | None = None,
    ) -> None:
        self.app = app
        self.catalog = catalog
        self.settings = settings or AccessSettings()
        self.counters = counters or Counters()
        self.now = now
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            raise RuntimeError(f"no rule for ASGI connections of type {scope['type']!r}")
        method = WEBSOCKET if scope["type"] == "websocket" else scope["method"]
        path = route_path(scope)
        rule = rule_for(method, path, self.settings.public)
        view = self.catalog.view
        exchange = (
            RequestMetrics(self.traffic) if self.traffic is not None and rule.tokens else None
        )
        try:
            if rule.need == "public":
                principal = None
            else:
                principal = authenticate(view, scope["headers"], self.now())
                check_scope(principal, rule)
            answer = _models_answer(view, principal, path) if rule is LIST and principal else None
            if scope["type"] == "http" and not rule.model:
                limit_bytes = self.settings.max_body_bytes
                receive = body.bounded(scope["headers"], receive, limit_bytes)
        except RequestRejectedError as refusal:
            self._count(refusal, exchange)
            await reject(refusal, scope, receive, send)
            return
        if answer is not None:
            await JSONResponse(answer)(scope, receive, send)
        elif principal is not None and rule.model:
            await self._serve(rule, view, principal, exchange, scope, receive, send)
        else:
            await self.app({**scope, SCOPE_KEY: principal}, receive, send)

    async def _serve(
        self,
        rule: Rule,
        view: View,
        principal: Principal,
        exchange: RequestMetrics | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """A request that names a model, from its body to the end of its answer."""
        headers = list(scope["headers"])
        tenant = NOBODY
        if exchange is not None:
            headers = exchange.trace(headers)
        try:
            raw = await body.read_body(headers, receive, self.settings.max_body_bytes)
            if raw is None:
                if exchange is not None:
                    exchange.gone()
                return
            document = body.parse(
                raw,
                self.settings.max_depth,
                max_members=self.settings.max_members,
                max_values=self.settings.max_values,
            )
            if view is not self.catalog.view:
                # The upload took its time: what was revoked or published meanwhile counts.
                view = self.catalog.view
                principal = authenticate(view, headers, self.now())
                check_scope(principal, rule)
            self._check_fields(document, principal)
            # From here to the slot nothing waits, so a revision found is at once one in flight.
            target = models.resolve(view, principal, document.get("model"))
            tenant = NOBODY if target.account in view.base_models else target.account
            document["model"] = target.served
            hide = exchange is not None and self._ask_usage(route_path(scope), document)
            payload = body.encode(document)
            estimate = estimate_prompt(len(payload)) if rule.tokens else 0
            answers = count_answers(document) if rule.tokens else 1
            slot = self.counters.admit(target, estimate, answers)
        except RequestRejectedError as refusal:
            self._count(refusal, exchange, tenant)
            await reject(refusal, scope, receive, send)
            return
        meter = UsageMeter(send, estimate, exchange, hide_usage=hide)
        inner = {**scope, "headers": body.headers_for(headers, payload), SCOPE_KEY: principal}
        again = body.replay(payload, receive)
        try:
            if exchange is not None:
                exchange.leads_to(tenant, target.served, judge=not document.get("echo"))
                await exchange.follow(self.app, inner, again, meter)
            elif estimate and target.limits.tokens_per_minute is not None:
                await self.app(inner, again, meter.send)
            else:
                await self.app(inner, again, send)
        finally:
            slot.close(meter.tokens if rule.tokens else 0)

    def _count(
        self, refusal: RequestRejectedError, exchange: RequestMetrics | None, tenant: str = NOBODY
    ) -> None:
        if exchange is not None:
            exchange.refused(refusal.reason, tenant)
        elif self.traffic is not None:
            self.traffic.rejected(refusal.reason, tenant)

    def _ask_usage(self, path: str, document: dict[str, Any]) -> bool:
        """Ask for a stream's usage; whether the client did not, and is not to see it."""
        if (
            path not in _TELL_USAGE
            or self.settings.usage_told
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
        """Errors: Refusal, 400; also for a priority that only who runs the server may ask for."""
        for name in sorted(self.settings.refused_fields & document.keys()):
            if document[name]:
                raise RequestRejectedError(
                    400,
                    f"`{name}` is not offered on this server; leave it out.",
                    param=name,
                    reason="field",
                )
        priority = document.get("priority")
        late = priority is None or (type(priority) is int and priority >= 0)
        if not late and not (principal.whole_server and "admin" in principal.scopes):
            raise RequestRejectedError(
                400,
                "`priority` is less than 0, or no whole number; below 0, which is before all "
                "others, takes a key with the scope `admin` for all tenants.",
                param="priority",
                reason="field",
            )


def authenticate(view: View, headers: body.HeaderList, now: float) -> Principal:
    """Whose key the request carries. Errors: Refusal, 401; unknown and expired sound the same.

    The key is searched by its hash, so the time taken tells nothing about keys that exist.
    """
    secret = _sent(headers)
    if not secret:
        raise _unauthorized(
            "this route needs a key: send one `Authorization: Bearer KEY` header, or one "
            "`x-api-key: KEY`.",
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


def _sent(headers: body.HeaderList) -> bytes:
    """The one key that is sent, as OpenAI's clients do or as Anthropic's; nothing for several."""
    bearer = [value for name, value in headers if name == b"authorization"]
    plain = [value for name, value in headers if name == b"x-api-key"]
    if len(bearer) + len(plain) != 1:
        return b""
    if plain:
        return plain[0].strip()
    kind, _, secret = bearer[0].partition(b" ")
    return secret.strip() if kind.lower() == b"bearer" else b""


def check_scope(principal: Principal, rule: Rule) -> None:
    """`admin` includes `read`; neither includes `serve`. Errors: Refusal, 403."""
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
    """Who asked, for the routes behind; None on a public path, KeyError without `Access`."""
    found: Principal | None = scope[SCOPE_KEY]
    return found


def _models_answer(view: View, principal: Principal, path: str) -> dict[str, Any]:
    """Errors: Refusal, 404."""
    if path == MODELS:
        return models.listing(view, principal)
    return models.describe(view, principal, path.removeprefix(f"{MODELS}/"))


def _unauthorized(message: str, reason: str, more: str = "") -> RequestRejectedError:
    headers = {"WWW-Authenticate": f'Bearer realm="safegene"{more}'}
    return RequestRejectedError(401, message, headers=headers, reason=reason)
