"""Routes of keys: a secret is shown once, valid at once, and never reaches further."""

from __future__ import annotations

from typing import Any

import pytest
from tenant_setup import World, rejected, world

__all__ = ["world"]

KEY = {
    *("name", "prefix", "scopes", "tenants", "default_tenant", "expires_at", "revoked_at"),
    "created_at",
}


def add(world: World, name: str = "new", *, key: str = "admin", **more: Any) -> Any:
    body = {"name": name, "scopes": ["read"], "tenants": ["acme"], **more}
    return world.json("POST", "/keys", body, key=key)


def test_a_key_from_its_beginning_to_its_end(world: World) -> None:
    made = add(world)
    assert set(made) == KEY | {"secret"} and made["secret"].startswith(made["prefix"])
    assert world.json("GET", "/whoami", key=made["secret"])["name"] == "new"
    (listed,) = [k for k in world.json("GET", "/keys")["data"] if k["name"] == "new"]
    assert set(listed) == KEY
    rotated = world.json("POST", "/keys/new/rotate")
    rejected(world.request("GET", "/whoami", key=made["secret"]), 401)
    assert world.json("GET", "/whoami", key=rotated["secret"])["tenants"] == ["acme"]
    assert world.json("DELETE", "/keys/new")["revoked_at"]
    rejected(world.request("GET", "/whoami", key=rotated["secret"]), 401)
    assert world.json("DELETE", "/keys/new")["revoked_at"]
    rejected(world.request("POST", "/keys/new/rotate"), 409, "revoked")


def test_no_secret_is_listed_or_written_down(world: World) -> None:
    secret = add(world)["secret"]
    for path in ("/keys", "/audit"):
        assert secret not in world.request("GET", path).text
    assert secret.encode() not in (world.root / "registry.db").read_bytes()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"tenants": []}, "tenants"),
        ({"tenants": ["A B"]}, "tenant name"),
        ({"default_tenant": "other"}, "default_tenant"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"name": "a/b"}, "name"),
        ({"name": ""}, "name"),
        ({"secret": "x" * 40}, "secret"),
    ],
)
def test_keys_that_cannot_be(world: World, more: dict[str, Any], words: str) -> None:
    body = {"name": "new", "scopes": ["read"], "tenants": ["acme"], **more}
    rejected(world.request("POST", "/keys", body), 400, words)


def test_an_expiry_is_stored_to_the_second(world: World) -> None:
    made = add(world, expires_at="2090-01-01T00:00:00+02:00")
    assert made["expires_at"] == "2089-12-31T22:00:00Z"
    assert world.json("GET", "/whoami", key=made["secret"])["expires_at"] == made["expires_at"]


def test_a_key_for_some_tenants_makes_no_key_for_others(world: World) -> None:
    for tenants in (["*"], ["base"], ["acme", "other"]):
        body = {"name": "new", "scopes": ["read"], "tenants": tenants}
        rejected(world.request("POST", "/keys", body, key="acme"), 403, "further than yours")
    assert add(world, key="acme")["tenants"] == ["acme"]
    assert {k["name"] for k in world.json("GET", "/keys", key="acme")["data"]} == {
        *("acme", "new", "serve")
    }


def test_a_key_that_reaches_further_is_not_there_for_others(world: World) -> None:
    for method, path in (("POST", "/keys/{}/rotate"), ("DELETE", "/keys/{}")):
        theirs = rejected(world.request(method, path.format("read"), key="acme"), 404)
        none = rejected(world.request(method, path.format("absent"), key="acme"), 404)
        assert theirs.replace("read", "absent") == none
    assert world.json("GET", "/whoami", key="read")["tenants"] == ["*"]


def test_one_name_once(world: World) -> None:
    add(world)
    body = {"name": "new", "scopes": ["read"], "tenants": ["acme"]}
    rejected(world.request("POST", "/keys", body), 409, "exists")


@pytest.mark.parametrize(
    "timestamp", ["9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+14:00", "9999-01-01T00:00:00Z"]
)
def test_an_unrepresentable_expiry_is_rejected(world: World, timestamp: str) -> None:
    body = {"name": "new", "scopes": ["read"], "tenants": ["acme"], "expires_at": timestamp}
    rejected(world.request("POST", "/keys", body), 400, "expected a year from 1900 to 9000")
    rejected(world.request("DELETE", "/keys/new"), 404)
