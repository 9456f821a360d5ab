"""Rollouts, replicas, audit and whoami: what an operator looks at, and what a tenant's key may."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from tenant_setup import World, rejected, world

__all__ = ["world"]

PROFILE = "/tenants/acme/support/profile"


def test_rollouts_show_which_replicas_follow(world: World) -> None:
    world.serve("acme/support")
    world.json("PATCH", PROFILE, {"scale": 2})
    newest, first = world.json("GET", "/rollouts")["data"]
    assert (newest["revisions"], first["revisions"]) == (["acme/support@2"], ["acme/support@1"])
    assert newest == world.json("GET", f"/rollouts/{newest['id']}")
    late = world.registry.replicas.join("late", 2, actor="replica")
    world.json("PATCH", PROFILE, {"scale": 0.5})
    rollout = world.json("GET", "/rollouts", params={"limit": 1})["data"][0]
    assert (rollout["applied"], rollout["live"], rollout["done"]) == (1, 2, False)
    (lag,) = rollout["lagging"]
    assert lag["replica"] == late.id and "has no receipt" in lag["reason"]
    rejected(world.request("GET", "/rollouts/999"), 404)


def test_rollouts_of_others_are_not_shown(world: World) -> None:
    world.serve("acme/support")
    world.serve("other", start=5)
    world.json("PUT", f"/families/{world.replica.header.digest}/floor", {"floor": {"0": 1.5}})
    floor, first = world.json("GET", "/rollouts", key="acme")["data"]
    assert first["tenants"] == ["acme/support"]
    assert floor["tenants"] == ["acme/support"] and floor["revisions"] == ["acme/support@2"]
    theirs = rejected(world.request("GET", "/rollouts/2", key="acme"), 404)
    assert theirs.replace("2", "9") == rejected(
        world.request("GET", "/rollouts/9", key="acme"), 404
    )
    world.registry.replicas.join("late", 2, actor="replica")
    lagging = world.json("GET", f"/rollouts/{floor['id']}", key="acme")["lagging"]
    assert [lag["reason"] for lag in lagging] == ["has not applied this rollout yet"]


def test_replicas(world: World) -> None:
    (replica,) = world.json("GET", "/replicas")["data"]
    assert (replica["id"], replica["host"], replica["pid"]) == (world.replica.id, "host", 1)
    assert replica["applied_version"] == world.registry.version() and replica["faults"] == []
    rejected(world.request("GET", "/replicas", key="acme"), 403)


def test_the_audit_page_by_page(world: World) -> None:
    world.serve("acme/support")
    whole = world.json("GET", "/audit")["data"]
    assert [e["id"] for e in whole] == sorted((e["id"] for e in whole), reverse=True)
    read, cursor = [], None
    while True:
        params = {"limit": 3} if cursor is None else {"limit": 3, "cursor": cursor}
        page = world.json("GET", "/audit", params=params)
        read += page["data"]
        cursor = page["cursor"]
        if cursor is None:
            break
        assert len(page["data"]) == 3
    assert read == whole
    of = world.json("GET", "/audit", params={"target": "acme/support", "action": "revision."})
    assert {e["action"] for e in of["data"]} == {
        *("revision.add", "revision.checking", "revision.ready")
    }
    since = {"since": "2090-01-01T00:00:00Z"}
    assert world.json("GET", "/audit", params=since)["data"] == []
    rejected(world.request("GET", "/audit", params={"since": "yesterday"}), 400, "since")


def test_a_key_for_some_tenants_reads_their_audit_alone(world: World) -> None:
    world.serve("acme/support")
    world.registry.tenants.add("acme", world.replica.header.digest, actor="test")
    rejected(world.request("GET", "/audit", key="acme"), 403, "name one of them")
    rejected(world.request("GET", "/audit", params={"target": "other"}, key="acme"), 403)
    params = {"target": "acme/support@1"}
    assert world.json("GET", "/audit", params=params, key="acme")["data"]
    # There is a key `acme` too, whose rows are not the tenant's.
    named = {"target": "acme"}
    assert {e["action"] for e in world.json("GET", "/audit", params=named)["data"]} == {
        *("key.add", "tenant.add")
    }
    own = world.json("GET", "/audit", params=named, key="acme")["data"]
    assert {e["action"] for e in own} == {"tenant.add"}


def test_whoami_shows_the_requests_own_key(world: World) -> None:
    assert world.json("GET", "/whoami", key="acme") == {
        "name": "acme",
        "scopes": ["admin", "serve"],
        "tenants": ["acme", "acme/support"],
        "default_tenant": None,
        "base": False,
        "expires_at": None,
    }


def test_whoami_of_a_key_with_the_last_representable_expiry(world: World) -> None:
    made = world.registry.keys.add(
        "last",
        scopes=["read"],
        tenants=["*"],
        expires_at=datetime.max.replace(tzinfo=UTC),
        actor="x",
    )
    asyncio.run(world.replica.apply())
    shown = world.json("GET", "/whoami", key=made.secret)
    assert shown["expires_at"] == "9999-12-31T23:59:59Z"


@pytest.mark.parametrize("name", ["since", "until"])
@pytest.mark.parametrize("timestamp", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_the_audit_rejects_unrepresentable_timestamps(
    world: World, name: str, timestamp: str
) -> None:
    response = world.request("GET", "/audit", params={name: timestamp})
    rejected(response, 400, "expected a year from 1900 to 9000")
    assert response.json()["error"]["param"] == name
