"""`AccessMiddleware` before an app that echoes: who gets through, where, and with which model.

Limits, streams and broken connections are in test_server_access_flow.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from access_app import CHAT, KEYS, TENANTS, VIEW, chat, echo_app, guarded, rejected, send_request
from hypothesis import given, settings
from hypothesis import strategies as st

from safegene_server.access.catalog import Catalog, Principal, Tenant, key_digest, make_view
from safegene_server.access.limits import Counters
from safegene_server.access.middleware import AccessMiddleware, AccessSettings
from safegene_server.access.route_permissions import RULES
from safegene_vllm.errors import ConfigError

# Keys


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer  ")],
        [("Authorization", "sg-acme")],
        [("Authorization", "Basic sg-acme")],
        [("Authorization", "Bearer sg-absent")],
        [("Authorization", "Bearer sg-acme x")],
        [("Authorization", "Bearer SG-ACME")],
        [("Authorization", "Bearer sg-late")],
        [("Authorization", b"Bearer \xff\xfe")],
        [("Authorization", "Bearer sg-acme"), ("Authorization", "Bearer sg-other")],
        [("x-api-key", "sg-absent")],
        [("x-api-key", "")],
        [("x-api-key", "Bearer sg-acme")],
        [("x-api-key", "sg-acme"), ("x-api-key", "sg-acme")],
        [("x-api-key", "sg-acme"), ("Authorization", "Bearer sg-plain")],
        [("x-api-key", "sg-acme"), ("Authorization", "Basic sg-acme")],
        [("x-api-key", ""), ("Authorization", "Bearer sg-acme")],
    ],
)
def test_no_key_no_route(headers: Any) -> None:
    app = echo_app()
    transport = httpx.ASGITransport(app=guarded(app))

    async def all_routes() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return [
                await client.request(method, route.path, headers=headers)  # type: ignore[attr-defined]
                for route in app.routes
                for method in getattr(route, "methods", set()) - {"HEAD"}
                if route.path not in ("/health", "/ping") or method == "POST"  # type: ignore[attr-defined]
            ]

    responses = asyncio.run(all_routes())
    assert len(responses) > 70
    for response in responses:
        rejected(response, 401)
        assert response.headers["www-authenticate"].startswith('Bearer realm="safegene"')


def test_the_scheme_is_read_in_any_case() -> None:
    headers = {"Authorization": "bEARER   sg-acme "}
    assert send_request(guarded(), "GET", "/v1/models", headers=headers).status_code == 200


def test_x_api_key_is_accepted() -> None:
    response = send_request(guarded(), "GET", "/v1/models", headers={"X-Api-Key": "sg-acme"})
    assert response.status_code == 200
    assert response.content == send_request(guarded(), "GET", "/v1/models", "acme").content


def test_one_key_in_both_headers_is_accepted() -> None:
    both = {"X-Api-Key": "sg-acme", "Authorization": "Bearer sg-acme"}
    response = send_request(guarded(), "GET", "/v1/models", headers=both)
    assert response.content == send_request(guarded(), "GET", "/v1/models", "acme").content


def test_a_key_ends_at_its_time() -> None:
    rejected(send_request(guarded(), "GET", "/v1/models", "late"), 401)
    assert send_request(guarded(), "GET", "/v1/models", "soon").status_code == 200


def test_unknown_and_expired_sound_the_same() -> None:
    late = send_request(guarded(), "GET", "/v1/models", "late")
    assert late.content == send_request(guarded(), "GET", "/v1/models", "absent").content


def test_an_empty_catalog_rejects_every_key() -> None:
    rejected(
        send_request(AccessMiddleware(echo_app(), Catalog()), "GET", "/v1/models", "acme"), 401
    )


def test_a_revoked_key_is_out_with_the_next_view() -> None:
    access = guarded()
    assert chat(access, "acme").status_code == 200
    access.catalog.replace(make_view(keys={}, tenants=TENANTS))
    rejected(chat(access, "acme"), 401)


# Scopes


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/models", {"acme", "plain", "other", "base", "soon"}),
        ("GET", "/v1/safegene/whoami", set(KEYS) - {"late"}),
        ("GET", "/v1/safegene/tenants", {"read", "read-acme", "admin", "admin-acme"}),
        ("POST", "/v1/safegene/tenants", {"admin", "admin-acme"}),
        ("GET", "/metrics", {"read", "admin"}),
        ("GET", "/server_info", {"admin"}),
        ("POST", "/v1/load_lora_adapter", {"admin"}),
        ("POST", "/collective_rpc", {"admin"}),
        ("POST", "/invocations", {"admin"}),
        ("GET", "/v1/responses/resp_1", {"admin"}),
        ("POST", "/unheard/of", {"admin"}),
        ("GET", "/v1/safegene/tenants%0A", {"admin"}),
    ],
)
def test_the_scopes_of_a_route(method: str, path: str, allowed: set[str]) -> None:
    access = guarded()
    statuses = {key: send_request(access, method, path, key).status_code for key in KEYS}
    assert statuses.pop("late") == 401
    assert statuses == {key: 200 if key in allowed else 403 for key in statuses}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completions/", 307),
        ("POST", "//v1/chat/completions", 404),
        ("GET", "/v1/files", 404),
        ("POST", "/v1/moderations", 404),
        ("GET", "/v1/chat/completions", 405),
        # Routes for administrators, under their own method and under another.
        ("POST", "/sleep", 403),
        ("GET", "/sleep", 403),
        ("GET", "/unheard/of", 403),
        ("DELETE", "/unheard/of", 403),
        ("POST", "/v1/responses/r/cancel", 403),
        ("DELETE", "/v1/responses/r", 403),
        ("GET", "/metrics", 403),
        ("POST", "/v1/chat/completions%0A", 403),
    ],
)
def test_a_path_that_the_app_does_not_serve_is_not_forbidden(
    method: str, path: str, status: int
) -> None:
    app = echo_app()
    access = guarded(app, router=app.router)
    response = send_request(access, method, path, "acme")
    assert response.status_code == status, response.text
    if status == 403:
        rejected(response, 403, "needs the scope")
    rejected(send_request(access, method, path), 401)
    rejected(send_request(access, method, path, "late"), 401)


def test_a_scope_that_is_missing_is_named() -> None:
    rejected(
        chat(guarded(), "admin", model="acme"), 403, "needs the scope `serve`; the key has: ad"
    )
    rejected(send_request(guarded(), "POST", "/sleep", "admin-acme"), 403, "concerns all tenants")


def test_public_paths_are_exact_and_for_reading() -> None:
    access = guarded(settings=AccessSettings(public=frozenset({"/metrics", "/version"})))
    assert send_request(access, "GET", "/metrics").status_code == 200
    assert send_request(access, "GET", "/version").json()["principal"] is None
    for method, path in [("GET", "/metrics/"), ("GET", "/metrics/x"), ("POST", "/version")]:
        rejected(send_request(access, method, path), 401)
    rejected(send_request(access, "GET", "/health"), 401)


@pytest.mark.parametrize("path", ["metrics", "/v1/", "/v1/*", "/", ""])
def test_a_public_path_that_is_not_exact_is_rejected(path: str) -> None:
    with pytest.raises(ConfigError, match="not an exact path"):
        AccessSettings(public=frozenset({path}))


def test_routes_know_the_principal() -> None:
    response = send_request(guarded(), "GET", "/v1/safegene/tenants", "read-acme")
    assert response.json()["principal"] == "read-acme"


# Models


@pytest.mark.parametrize("path", [n.split()[1] for n, rule in RULES.items() if rule.model])
def test_every_route_that_takes_a_model_is_given_the_revision(path: str) -> None:
    access = guarded()
    response = send_request(
        access, "POST", path, "acme", json={"model": "acme/support", "x": [1, "ü"]}
    )
    got = response.json()
    assert got["got"] == {"model": "acme/support@2", "x": [1, "ü"]}
    assert got["length"] == str(got["bytes"])
    for foreign in ("other", "other@1", "org/Base", "absent"):
        rejected(send_request(access, "POST", path, "acme", json={"model": foreign}), 404, foreign)


def test_the_response_names_the_revision() -> None:
    access = guarded()
    assert chat(access, "acme", model="acme").json()["model"] == "acme@7"
    assert chat(access, "acme", model="acme@6").json()["model"] == "acme@6"
    assert chat(access, "acme").json()["model"] == "acme@7"
    assert chat(access, "acme", model=None).json()["model"] == "acme@7"
    assert chat(access, "acme", model="").json()["model"] == "acme@7"
    assert chat(access, "base", model="org/Base").json()["model"] == "org/Base"
    rejected(chat(access, "plain"), 400, "no default tenant")
    rejected(chat(access, "base"), 400)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"model": "\\ud800"}', 404),
        (b'{"model": "acme@\\udc00"}', 404),
        (b'{"\\ud800": 1, "\\ud800": 2}', 400),
        (b'{"model": "acme", "\\ud800": 1}', 400),
    ],
)
def test_an_unpaired_surrogate_is_rejected_like_other_invalid_text(
    content: bytes, status: int
) -> None:
    kind = {"content-type": "application/json"}
    rejected(send_request(guarded(), "POST", CHAT, "acme", content=content, headers=kind), status)


def test_a_change_of_alias_counts_from_the_next_request() -> None:
    access = guarded()
    assert chat(access, "acme", model="acme").json()["model"] == "acme@7"
    access.catalog.replace(make_view(keys=VIEW.keys, tenants=[Tenant("acme", "acme@8")]))
    assert chat(access, "acme", model="acme").json()["model"] == "acme@8"
    rejected(chat(access, "acme", model="acme@7"), 404)


@pytest.mark.parametrize(
    "name", ["background", "previous_response_id", "kv_transfer_params", "ec_transfer_params"]
)
def test_fields_that_reach_into_the_engine_are_rejected(name: str) -> None:
    response = send_request(guarded(), "POST", "/v1/responses", "acme", json={name: {"x": 1}})
    rejected(response, 400, name)
    assert response.json()["error"]["param"] == name
    unset = send_request(guarded(), "POST", "/v1/responses", "acme", json={name: None})
    assert unset.status_code == 200
    opened = guarded(settings=AccessSettings(rejected_fields=frozenset()))
    assert send_request(opened, "POST", "/v1/responses", "acme", json={name: 1}).status_code == 200


def test_only_administrators_may_send_a_negative_priority() -> None:
    both = frozenset({"serve", "admin"})
    keys = {
        key_digest("sg-acme"): Principal("acme", both, frozenset({"acme"}), "acme"),
        key_digest("sg-all"): Principal("all", frozenset({"serve"}), frozenset({"*"}), "acme"),
        key_digest("sg-root"): Principal("root", both, frozenset({"*"}), "acme"),
    }
    access = AccessMiddleware(echo_app(), Catalog(make_view(keys=keys, tenants=TENANTS)))
    for key in ("acme", "all"):
        for value in (-1, -(2**63), "-1", -1.0, [1], True):
            response = chat(access, key, priority=value)
            rejected(response, 400, "`priority`")
            assert response.json()["error"]["param"] == "priority"
        for value in (0, 5, None):
            assert chat(access, key, priority=value).json()["got"]["priority"] == value
    assert chat(access, "root", priority=-1).json()["got"]["priority"] == -1


def test_one_sees_only_ones_own_models() -> None:
    access = guarded()
    listed = send_request(access, "GET", "/v1/models", "acme").json()
    assert [card["id"] for card in listed["data"]] == ["acme", "acme/support"]
    assert (
        send_request(access, "GET", "/v1/models/acme/support", "acme").json() == listed["data"][1]
    )
    assert (
        send_request(access, "GET", "/v1/models/acme%2Fsupport", "acme").json() == listed["data"][1]
    )
    assert send_request(access, "GET", "/v1/models/acme@6", "acme").json()["root"] == "acme@6"
    for foreign in ("other", "absent", "org/Base", ""):
        rejected(send_request(access, "GET", f"/v1/models/{foreign}", "acme"), 404)


def test_bad_bodies_never_reach_the_app() -> None:
    access = guarded(settings=AccessSettings(max_body_bytes=100, max_depth=5))
    kind = {"content-type": "application/json"}
    for content, status in [
        (b'{"model": "acme", "model": "other"}', 400),
        (b'{"model": "acme"', 400),
        (b'{"a":' + b"[" * 6 + b"]" * 6 + b"}", 400),
        (b'{"model": "\xff"}', 400),
        (b'{"model": "' + b"x" * 100 + b'"}', 413),
    ]:
        rejected(send_request(access, "POST", CHAT, "acme", content=content, headers=kind), status)
    rejected(send_request(access, "POST", CHAT, "acme", content=b"{}"), 415)


@pytest.mark.parametrize(
    ("path", "key"), [("/v1/safegene/tenants", "admin-acme"), ("/unheard/of", "admin")]
)
def test_no_route_reads_more_than_the_limit(path: str, key: str) -> None:
    access = guarded(settings=AccessSettings(max_body_bytes=100))

    async def pieces(size_bytes: int) -> AsyncIterator[bytes]:
        yield b'{"model": "'
        yield b"x" * (size_bytes - 13)
        yield b'"}'

    assert send_request(access, "POST", path, key, json={"model": "x" * 80}).json()["bytes"] > 80
    rejected(send_request(access, "POST", path, key, json={"model": "x" * 100}), 413, "100 bytes")
    assert send_request(access, "POST", path, key, content=pieces(100)).json()["bytes"] == 100
    response = send_request(access, "POST", path, key, content=pieces(101))
    assert response.status_code == 413


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*KEYS, "absent"]),
    st.sampled_from(["acme", "acme@7", "acme@6", "acme/support", "other", "other@1", "org/Base"])
    | st.text(max_size=12)
    | st.none()
    | st.integers(),
    st.binary(max_size=3),
)
def test_a_key_never_reaches_another_tenants_model(key: str, model: Any, junk: bytes) -> None:
    own = {
        "acme": {"acme@7", "acme@6", "acme/support@2"},
        "plain": {"acme@7", "acme@6"},
        "soon": {"acme@7", "acme@6"},
        "other": {"other@1"},
        "base": {"org/Base"},
    }
    content = json.dumps({"model": model}).encode() + junk
    headers = {"content-type": "application/json"}
    response = send_request(ACCESS, "POST", "/tokenize", key, content=content, headers=headers)
    assert response.status_code in (200, 400, 401, 403, 404, 429)
    if response.status_code == 200:
        assert response.json()["model"] in own[key]
    else:
        rejected(response, response.status_code)
    assert not ACCESS.counters.running


ACCESS = guarded(counters=Counters(iter(range(0, 10**9, 60)).__next__))
