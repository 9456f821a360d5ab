"""Floors: one call raises every tenant below the floor, all or none."""

from __future__ import annotations

from typing import Any

import pytest
from registry_setup import ADAPTER, FAMILY, add_published, header, profile, registry, url

from safegene_server.registry import Registry
from safegene_vllm.errors import BoundsError, FrozenError, NotFoundError

__all__ = ["registry", "url"]


@pytest.fixture
def three(registry: Registry) -> Registry:
    """acme/support at 0.5, globex at 2.0, initech at 0.75, unborn at nothing."""
    for name in ("globex", "initech", "unborn"):
        registry.tenants.add(name, FAMILY, actor="test")
    add_published(registry, "acme/support", 0.5, adapter_digest=ADAPTER)
    add_published(registry, "globex", 2.0)
    add_published(registry, "initech", 0.75)
    return registry


def served(registry: Registry) -> dict[str, tuple[int, tuple[float, ...]]]:
    return {
        one.tenant: (one.number, one.profile.coefficients) for one in registry.snapshot().revisions
    }


def test_all_tenants_below_the_floor_are_raised_in_one_version(three: Registry) -> None:
    version = three.version()
    rollout = three.policies.set_floor(FAMILY, {0: 1.0}, actor="op")
    assert rollout is not None
    assert rollout.version == three.version() == version + 1
    assert (rollout.kind, rollout.tenants) == ("floor", ("acme/support", "initech"))
    assert served(three) == {
        "acme/support": (2, (1.0, 0.0, 0.5)),
        "globex": (1, (2.0, 0.0, 0.5)),
        "initech": (2, (1.0, 0.0, 0.5)),
    }
    raised = three.revisions.get("acme/support", 2)
    assert rollout.revisions[0] == raised.id
    before = three.revisions.get("acme/support", 1)
    assert (before.state, raised.state) == ("superseded", "published")
    assert raised.adapter_digest == ADAPTER
    assert raised.gate == {"raised_from": "acme/support@1"}
    origin = {"raised_from": before.profile.digest, "floor": {"0": 1.0}}
    assert raised.profile.calibration["floor"] == origin
    assert three.policies.get(FAMILY).floor == {0: 1.0}


def test_a_floor_that_raises_no_tenant_is_a_change(three: Registry) -> None:
    before, version = served(three), three.version()
    assert three.policies.set_floor(FAMILY, {2: 0.5}, actor="op") is None
    assert (served(three), three.version()) == (before, version + 1)
    assert three.policies.set_floor(FAMILY, {2: 0.5}, actor="op") is None
    assert three.version() == version + 1


def test_removing_the_floor_lowers_no_coefficient(three: Registry) -> None:
    three.policies.set_floor(FAMILY, {0: 1.0}, actor="op")
    before = served(three)
    assert three.policies.set_floor(FAMILY, {}, actor="op") is None
    assert (served(three), three.policies.get(FAMILY).floor) == (before, {})
    three.rollouts.rollback("acme/support", actor="op")
    assert served(three)["acme/support"] == (1, (0.5, 0.0, 0.5))


def test_a_frozen_tenant_below_the_floor_blocks_the_change(three: Registry) -> None:
    three.tenants.freeze("initech", actor="op")
    before = three.snapshot(), three.audit.page()
    with pytest.raises(FrozenError, match="below the new floor: initech; unfreeze"):
        three.policies.set_floor(FAMILY, {0: 1.0}, actor="op")
    assert (three.snapshot(), three.audit.page()) == before
    three.policies.freeze(FAMILY, actor="op")
    with pytest.raises(FrozenError, match=r"is frozen and 2 of its tenants"):
        three.policies.set_floor(FAMILY, {0: 1.0}, actor="op")
    assert three.policies.set_floor(FAMILY, {0: 0.25}, actor="op") is None
    assert three.policies.get(FAMILY).frozen


def test_a_frozen_tenant_above_the_floor_does_not_block(three: Registry) -> None:
    three.tenants.freeze("globex", actor="op")
    assert three.policies.set_floor(FAMILY, {0: 1.0}, actor="op") is not None


def test_retired_tenants_and_other_families_are_unchanged(three: Registry) -> None:
    three.rollouts.retire("initech", actor="op")
    other = header("second", "e")
    three.families.add(other, None, actor="op")
    rollout = three.policies.set_floor(FAMILY, {0: 1.0}, actor="op")
    assert rollout is not None and rollout.tenants == ("acme/support",)
    assert three.policies.get(other.digest).floor == {}


def test_the_floor_applies_to_tenants_added_later(three: Registry) -> None:
    three.policies.set_floor(FAMILY, {0: 1.0}, actor="op")
    with pytest.raises(BoundsError, match=r"layer 0 has 0\.5, the floor is 1\.0"):
        three.revisions.add("unborn", profile(0.5), actor="me")
    add_published(three, "unborn", 1.0)
    assert served(three)["unborn"] == (1, (1.0, 0.0, 0.5))


@pytest.mark.parametrize(
    ("floor", "why"),
    [
        ({1: 0.5}, "layer 1 has no vector"),
        ({7: 0.5}, "layer 7 has no vector"),
        ({"0": 0.5}, "layer '0' has no vector"),
        ({0: 3.5}, "layer 0 has floor 3.5, expected 0.0 to 3.0"),
        ({0: float("nan")}, "layer 0 has floor nan"),
        ({0: True}, "layer 0 has floor True"),
    ],
)
def test_invalid_floors_are_rejected(three: Registry, floor: Any, why: str) -> None:
    with pytest.raises(BoundsError, match=why):
        three.policies.set_floor(FAMILY, floor, actor="op")
    assert three.policies.get(FAMILY).floor == {}


def test_policies_need_an_existing_family(registry: Registry) -> None:
    for call in (
        lambda: registry.policies.get("sha256:0"),
        lambda: registry.policies.set_floor("sha256:0", {}, actor="op"),
        lambda: registry.policies.freeze("sha256:0", actor="op"),
    ):
        with pytest.raises(NotFoundError):
            call()
