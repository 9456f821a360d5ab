"""The routes of families: shown to all, changed only with a key for all tenants."""

from __future__ import annotations

from dataclasses import replace

from artifact_files import FAMILY
from tenant_setup import World, rejected, world

__all__ = ["world"]

PATH = f"/families/{FAMILY.digest}"


def test_a_family_is_shown(world: World) -> None:
    (family,) = world.json("GET", "/families")["data"]
    assert family == world.json("GET", PATH, key="acme")
    assert (family["name"], family["digest"]) == (FAMILY.name, FAMILY.digest)
    assert (family["num_layers"], family["layers"]) == (3, [0, 2])
    assert tuple(family["bounds"]) == FAMILY.bounds
    assert (family["floor"], family["frozen"]) == ({}, False)
    rejected(world.request("GET", "/families/sha256:none"), 404, "no family")


def test_where_a_family_lies_is_for_keys_for_all_tenants(world: World) -> None:
    second = replace(FAMILY, name="second", digest="sha256:" + "2" * 64)
    world.registry.families.add(second, "/srv/families/f", actor="test")
    for path in (f"/families/{second.digest}", "/families"):
        assert "/srv/families/f" in world.request("GET", path, key="read").text
        assert "/srv" not in world.request("GET", path, key="acme").text


def test_a_floor_raises_tenants_and_is_shown(world: World) -> None:
    world.serve("acme/support")
    done = world.json("PUT", f"{PATH}/floor", {"floor": {"0": 1.5}})
    assert done["family"]["floor"] == {"0": 1.5}
    assert done["rollout"]["kind"] == "floor" and done["rollout"]["done"]
    assert done["rollout"]["revisions"] == ["acme/support@2"]
    assert world.json("PUT", f"{PATH}/floor", {"floor": {}})["rollout"] is None
    rejected(world.request("PUT", f"{PATH}/floor", {"floor": {"1": 1.0}}), 400, "layer 1")
    rejected(world.request("PUT", f"{PATH}/floor", {"floor": {"x": 1.0}}), 400, "floor")
    rejected(world.request("PUT", "/families/sha256:none/floor", {"floor": {}}), 404)


def test_a_freeze_of_all(world: World) -> None:
    world.serve("acme/support")
    assert world.json("POST", f"{PATH}/freeze")["frozen"] is True
    rejected(world.request("PATCH", "/tenants/acme/support/profile", {"scale": 1.5}), 409, "frozen")
    assert world.json("POST", f"{PATH}/unfreeze")["frozen"] is False
    assert world.json("PATCH", "/tenants/acme/support/profile", {"scale": 1.5})["rollout"]


def test_a_key_for_some_tenants_changes_no_family(world: World) -> None:
    for method, path in (("PUT", "floor"), ("POST", "freeze"), ("POST", "unfreeze")):
        response = world.request(method, f"{PATH}/{path}", {"floor": {}}, key="acme")
        rejected(response, 403, "all tenants")
    assert not world.registry.policies.get(FAMILY.digest).frozen
