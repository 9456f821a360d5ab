"""`Access`: pure ASGI, in front of the whole app; nothing passes that is not let through here.

A request is let through by its route's rule, its key and its key's scopes; where it names a model,
also by the catalog and the limits, and then its body goes on with the revision's name in it. An
answer passes untouched, chunk by chunk. Belongs inside a CORS middleware, which answers preflights
without a key, and outside of whatever reads bodies.
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
from safegene_server.access.refusal import Refusal, refuse
from safegene_server.access.table import LIST, MODELS, WEBSOCKET, Rule, route_path, rule_for
from safegene_server.access.usage import Meter, estimate_prompt
from safegene_vllm.errors import ConfigError

SCOPE_KEY = "safegene.principal"


@dataclass(frozen=True)
class AccessSettings:
    """`public`: exact paths whose GET needs no key. `refused_fields`: what no body may ask for.

    The defaults of `refused_fields` reach what other tenants left in the engine: answers kept under
    an id, work that outlives its request and its limits, and blocks of another engine's cache.
    """

    public: frozenset[str] = frozenset({"/health", "/ping"})
    max_body_bytes: int = 16 * 2**20
    max_depth: int = 64
    refused_fields: frozenset[str] = frozenset(
        {"background", "ec_transfer_params", "kv_transfer_params", "previous_response_id"}
    )

    def __post_init__(self) -> None:
        """Errors: ConfigError."""
        for path in sorted(self.public):
            if not path.startswith("/") or path.endswith("/") or "*" in path:
                raise ConfigError(f"public: {path!r} is not an exact path such as '/metrics'.")
        for name in ("max_body_bytes", "max_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)!r}, expected 1 or more.")


class Access:
    """ASGI middleware. `counters` tells what is in flight; `now` gives Unix time in seconds."""

    def __init__(
        self,
        app: ASGIApp,
        catalog: Catalog,
        settings: AccessSettings | None = None,
        counters: Counters | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.app = app
        self.catalog = catalog
        self.settings = settings or AccessSettings()
        self.counters = counters or Counters()
        self.now = now

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
        try:
            if rule.need == "public":
                principal = None
            else:
                principal = authenticate(view, scope["headers"], self.now())
                check_scope(principal, rule)
            answer = _models_answer(view, principal, path) if rule is LIST and principal else None
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send)
            return
        if answer is not None:
            await JSONResponse(answer)(scope, receive, send)
        elif principal is not None and rule.model:
            await self._serve(rule, view, principal, scope, receive, send)
        else:
            await self.app({**scope, SCOPE_KEY: principal}, receive, send)

    async def _serve(
        self,
        rule: Rule,
        view: View,
        principal: Principal,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """A request that names a model, from its body to the end of its answer."""
        headers = list(scope["headers"])
        try:
            raw = await body.read_body(headers, receive, self.settings.max_body_bytes)
            if raw is None:
                return
            document = body.parse(raw, self.settings.max_depth)
            if view is not self.catalog.view:
                # The upload took its time: what was revoked or published meanwhile counts.
                view = self.catalog.view
                principal = authenticate(view, headers, self.now())
                check_scope(principal, rule)
            self._check_fields(document)
            # From here to the slot nothing waits, so a revision found is at once one in flight.
            target = models.resolve(view, principal, document.get("model"))
            document["model"] = target.served
            payload = body.encode(document)
            estimate = estimate_prompt(len(payload)) if rule.tokens else 0
            slot = self.counters.admit(target, estimate)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send)
            return
        meter = None
        if estimate and target.limits.tokens_per_minute is not None:
            meter = Meter(send, estimate)
        inner = {**scope, "headers": body.headers_for(headers, payload), SCOPE_KEY: principal}
        try:
            outgoing = send if meter is None else meter.send
            await self.app(inner, body.replay(payload, receive), outgoing)
        finally:
            slot.close(0 if meter is None else meter.tokens)

    def _check_fields(self, document: dict[str, Any]) -> None:
        for name in sorted(self.settings.refused_fields & document.keys()):
            if document[name]:
                raise Refusal(
                    400, f"`{name}` is not offered on this server; leave it out.", param=name
                )


def authenticate(view: View, headers: body.HeaderList, now: float) -> Principal:
    """Whose key the request carries. Errors: Refusal, 401; unknown and expired sound the same.

    The key is searched by its hash, so the time taken tells nothing about keys that exist.
    """
    sent = [value for name, value in headers if name == b"authorization"]
    kind, _, secret = (sent[0] if len(sent) == 1 else b"").partition(b" ")
    secret = secret.strip()
    if kind.lower() != b"bearer" or not secret:
        raise _unauthorized("this route needs a key: send one `Authorization: Bearer KEY` header.")
    principal = view.keys.get(key_digest(secret))
    if principal is None or (principal.expires_at is not None and principal.expires_at <= now):
        raise _unauthorized(
            "the key is unknown, revoked or expired; ask the operator for another.",
            ', error="invalid_token"',
        )
    return principal


def check_scope(principal: Principal, rule: Rule) -> None:
    """`admin` includes `read`; neither includes `serve`. Errors: Refusal, 403."""
    scopes = principal.scopes
    if rule.need not in scopes and not (rule.need == "read" and "admin" in scopes):
        held = ", ".join(sorted(scopes)) or "none"
        raise Refusal(403, f"this route needs the scope `{rule.need}`; the key has: {held}.")
    if rule.whole_server and not principal.whole_server:
        raise Refusal(403, "this route concerns all tenants; the key is for some of them.")


def principal_of(scope: Scope) -> Principal | None:
    """Who asked, for the routes behind; None on a public path, KeyError without `Access`."""
    found: Principal | None = scope[SCOPE_KEY]
    return found


def _models_answer(view: View, principal: Principal, path: str) -> dict[str, Any]:
    """Errors: Refusal, 404."""
    if path == MODELS:
        return models.listing(view, principal)
    return models.describe(view, principal, path.removeprefix(f"{MODELS}/"))


def _unauthorized(message: str, more: str = "") -> Refusal:
    return Refusal(401, message, headers={"WWW-Authenticate": f'Bearer realm="safegene"{more}'})
