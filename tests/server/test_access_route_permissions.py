"""The table of routes: unknown routes need admin, and an app's unclassified routes are listed."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.routing import Match, Mount, Route

from safegene_server.access.route_permissions import (
    ANY_KEY,
    GENERATE,
    LIST,
    OPERATE,
    OUR_CHANGE,
    OUR_READ,
    PUBLIC,
    RENDER,
    RULES,
    WATCH,
    Rule,
    route_path,
    rule_for,
    unclassified,
)
from safegene_server.engine_routes import load_router, router

PATHS = st.text(alphabet="/av", max_size=8)


@pytest.mark.parametrize(
    ("method", "path", "rule"),
    [
        ("POST", "/v1/chat/completions", GENERATE),
        ("GET", "/v1/chat/completions", OPERATE),
        ("POST", "/v1/chat/completions/", OPERATE),
        ("POST", "//v1/chat/completions", OPERATE),
        ("POST", "/V1/chat/completions", OPERATE),
        ("POST", "/tokenize", RENDER),
        ("GET", "/v1/models", LIST),
        ("HEAD", "/v1/models", LIST),
        ("GET", "/v1/models/acme/support", LIST),
        ("DELETE", "/v1/models/acme", OPERATE),
        ("GET", "/metrics", WATCH),
        ("GET", "/metrics/", OPERATE),
        ("GET", "/metricsx", OPERATE),
        ("GET", "/health", PUBLIC),
        ("HEAD", "/health", PUBLIC),
        ("POST", "/health", OPERATE),
        ("GET", "/health/", OPERATE),
        ("GET", "/v1/safegene/ready", WATCH),
        ("HEAD", "/v1/safegene/receipts", WATCH),
        ("GET", "/v1/safegene/replicas", WATCH),
        ("POST", "/v1/safegene/replicas", OUR_CHANGE),
        ("GET", "/v1/safegene/families/sha256:ab", OUR_READ),
        ("PUT", "/v1/safegene/families/sha256:ab/floor", OPERATE),
        ("POST", "/v1/safegene/families/sha256:ab/freeze", OPERATE),
        ("GET", "/v1/safegene/tenants/acme/support", OUR_READ),
        ("PATCH", "/v1/safegene/tenants/acme/support/profile", OUR_CHANGE),
        ("DELETE", "/v1/safegene/keys/mine", OUR_CHANGE),
        ("GET", "/v1/safegene/whoami", ANY_KEY),
        ("POST", "/v1/safegene/tenants", OUR_CHANGE),
        ("OPTIONS", "/v1/safegene/tenants", OUR_CHANGE),
        ("GET", "/v1/safegenes", OPERATE),
        ("WEBSOCKET", "/v1/realtime", OPERATE),
        ("WEBSOCKET", "/health", OPERATE),
        ("GET", "/v1/responses/resp_1", OPERATE),
        ("POST", "/v1/responses/resp_1/cancel", OPERATE),
        ("OPTIONS", "/v1/chat/completions", OPERATE),
        ("GET", "/absent/knows", OPERATE),
        ("GET", "", OPERATE),
        ("GET", "/v1/safegene/receipts\n", OPERATE),
        ("GET", "/v1/safegene/tenants\n", OPERATE),
        ("GET", "/v1/models/acme\n", OPERATE),
        ("POST", "/v1/chat/completions\n", OPERATE),
    ],
)
def test_the_rule_of_a_request(method: str, path: str, rule: Rule) -> None:
    assert rule_for(method, path, frozenset({"/health"})) == rule


@given(st.text(max_size=8), st.text(max_size=20))
def test_whatever_is_not_named_needs_admin(method: str, path: str) -> None:
    rule = rule_for(method, path)
    assert rule.need != "public"
    named = f"{method} {path}" in RULES or path.startswith(("/v1/safegene", "/v1/models/"))
    assert named or rule == OPERATE


def test_the_rules_do_not_contradict_themselves() -> None:
    assert all(rule.need == "serve" for rule in RULES.values() if rule.model)
    assert all(rule.model for rule in RULES.values() if rule.tokens)
    assert all(rule.whole_server for rule in RULES.values() if rule.need in ("read", "admin"))
    assert "public" not in {rule.need for rule in RULES.values()}


def test_a_line_feed_leads_a_router_to_the_route_before_it() -> None:
    """Why such a path is closed."""
    route = Route("/v1/safegene/receipts", response)
    scope = {"type": "http", "method": "GET", "path": "/v1/safegene/receipts\n"}
    assert route.matches(scope)[0] is Match.FULL


@given(PATHS, PATHS)
def test_the_path_is_the_one_that_the_router_matches(path: str, root: str) -> None:
    scope = {"type": "http", "path": path, "root_path": root}
    assert route_path(scope) == get_route_path(scope)


async def response() -> None: ...


def test_routes_that_the_table_does_not_name() -> None:
    async def raw(scope: Any, receive: Any, send: Any) -> None: ...

    async def talk(websocket: WebSocket) -> None: ...

    class Raw:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    app = FastAPI()
    app.include_router(router)
    app.include_router(load_router)
    app.add_api_route("/v1/chat/completions", response, methods=["POST"])
    assert unclassified(app) == []
    app.add_api_route("/v1/chat/completions", response, methods=["PUT", "GET"])
    app.add_api_route("/v1/models/{other:path}", response)
    app.add_api_websocket_route("/v2/realtime", talk)
    app.mount("/metrics", raw)
    app.mount("/raw", raw)
    app.mount("/sub", Starlette(routes=[Route("/in", response), Mount("/deep", raw)]))
    app.router.routes.append(Route("/class", Raw()))
    assert unclassified(app) == [
        "ANY /class",
        "GET /sub/in",
        "GET /v1/chat/completions",
        "GET /v1/models/{other:path}",
        "MOUNT /raw",
        "MOUNT /sub/deep",
        "PUT /v1/chat/completions",
        "WEBSOCKET /v2/realtime",
    ]


def test_a_route_without_a_path_is_unclassified() -> None:
    class Unknown:
        """A kind of route that a newer framework may add."""

    app = Starlette()
    app.router.routes.append(Unknown())  # type: ignore[arg-type]
    assert unclassified(app) == ["ANY Unknown"]


def test_a_lazily_included_router_is_walked() -> None:
    class Included:
        """FastAPI 0.137 leaves an included router whole, without a path of its own."""

        def __init__(self, inner: APIRouter) -> None:
            self.routes = inner.routes

    inner = APIRouter()
    inner.add_api_route("/tokenize", response, methods=["POST"])
    inner.add_api_route("/hidden", response, methods=["POST"])
    app = Starlette()
    app.router.routes.append(Included(inner))  # type: ignore[arg-type]
    assert unclassified(app) == ["POST /hidden"]
