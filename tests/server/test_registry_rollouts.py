"""Rollouts: publication, rollback and retirement."""

from __future__ import annotations

import pytest
from registry_setup import FAMILY, HEADER, add_published, add_ready, profile, registry, url

from safegene_server.registry import Registry
from safegene_vllm.errors import BoundsError, ConflictError, NotFoundError, RegistryError

__all__ = ["registry", "url"]

TENANT = "acme/support"


def states(registry: Registry) -> list[str]:
    return [revision.state for revision in registry.revisions.list(TENANT)]


def served(registry: Registry) -> int | None:
    return registry.tenants.get(TENANT).published


def test_publishing_switches_the_alias_and_raises_the_version(registry: Registry) -> None:
    first, second = add_ready(registry, TENANT), add_ready(registry, TENANT)
    assert served(registry) is None
    version = registry.version()
    rollout = registry.rollouts.publish(TENANT, 1, actor="me", expected=0)
    assert (rollout.kind, rollout.tenants, rollout.revisions) == ("publish", (TENANT,), (first.id,))
    assert rollout.version == registry.version() == version + 1
    assert (served(registry), states(registry)) == (1, ["published", "ready"])
    rollout = registry.rollouts.publish(TENANT, 2, actor="me", expected=1)
    assert rollout.revisions == (second.id,)
    assert (served(registry), states(registry)) == (2, ["superseded", "published"])
    assert [one.kind for one in registry.rollouts.list()] == ["publish", "publish"]


def test_the_second_of_two_concurrent_publications_is_rejected(registry: Registry) -> None:
    for _ in range(3):
        add_ready(registry, TENANT)
    registry.rollouts.publish(TENANT, 1, actor="one")
    registry.rollouts.publish(TENANT, 2, actor="one", expected=1)
    before = registry.snapshot(), registry.audit.page()
    message = r"serves acme/support@2, expected acme/support@1: it was changed meanwhile"
    for change in (
        lambda: registry.rollouts.publish(TENANT, 3, actor="two", expected=1),
        lambda: registry.rollouts.rollback(TENANT, actor="two", expected=1),
        lambda: registry.rollouts.retire(TENANT, actor="two", expected=1),
    ):
        with pytest.raises(ConflictError, match=message):
            change()
    with pytest.raises(ConflictError, match="expected nothing"):
        registry.rollouts.publish(TENANT, 3, actor="two", expected=0)
    assert (registry.snapshot(), registry.audit.page()) == before


def test_only_ready_revisions_are_published(registry: Registry) -> None:
    added = registry.revisions.add(TENANT, profile(), actor="me")
    with pytest.raises(ConflictError, match="acme/support@1 is registered; only a revision that"):
        registry.rollouts.publish(TENANT, 1, actor="me")
    registry.revisions.set_state(added.id, "failed", actor="gate", reasons=["NaN in q_proj"])
    with pytest.raises(ConflictError, match=r"is failed \(NaN in q_proj\)"):
        registry.rollouts.publish(TENANT, 1, actor="me")
    with pytest.raises(NotFoundError, match="has no revision 2"):
        registry.rollouts.publish(TENANT, 2, actor="me")
    with pytest.raises(RegistryError):
        registry.rollouts.publish(TENANT, 0, actor="me")
    add_published(registry, TENANT)
    with pytest.raises(ConflictError, match="acme/support@2 is published"):
        registry.rollouts.publish(TENANT, 2, actor="me")


def test_a_checked_revision_becomes_ready_and_published_in_one_transaction(
    registry: Registry,
) -> None:
    registry.revisions.add(TENANT, profile(), actor="me")
    version, found = registry.version(), {"made_from": "acme/support@1"}
    with pytest.raises(ConflictError, match="expected acme/support@7"):
        registry.rollouts.publish(TENANT, 1, actor="me", expected=7, gate=found)
    assert states(registry) == ["registered"]
    rollout = registry.rollouts.publish(TENANT, 1, actor="me", gate=found)
    assert rollout.version == registry.version() == version + 1
    now = registry.revisions.get(TENANT, 1)
    assert (served(registry), now.state, now.gate) == (1, "published", found)
    assert [e.action for e in registry.audit.page().entries[:2]] == [
        "tenant.publish",
        "revision.ready",
    ]
    with pytest.raises(ConflictError, match="is published and cannot become ready"):
        registry.rollouts.publish(TENANT, 1, actor="me", gate=found)


def test_each_rollback_publishes_the_previous_revision(registry: Registry) -> None:
    for _ in range(3):
        add_published(registry, TENANT)
    rollout = registry.rollouts.rollback(TENANT, actor="me", expected=3)
    assert (rollout.kind, served(registry)) == ("rollback", 2)
    assert states(registry) == ["superseded", "published", "superseded"]
    registry.rollouts.rollback(TENANT, actor="me")
    assert served(registry) == 1
    with pytest.raises(ConflictError, match="nothing to roll back to"):
        registry.rollouts.rollback(TENANT, actor="me")
    # Forward again, to the one that was left: it is the newest publication now.
    registry.rollouts.publish(TENANT, 3, actor="me")
    registry.rollouts.rollback(TENANT, actor="me")
    assert served(registry) == 1


def test_a_rollback_follows_the_publications_not_the_numbers(registry: Registry) -> None:
    for _ in range(4):
        add_ready(registry, TENANT)
    for number in (3, 1, 4):
        registry.rollouts.publish(TENANT, number, actor="me")
    assert [one.number for one in registry.snapshot().previous] == [1]
    registry.rollouts.rollback(TENANT, actor="me")
    assert served(registry) == 1
    registry.rollouts.rollback(TENANT, actor="me")
    assert served(registry) == 3
    assert registry.snapshot().previous == ()


def test_a_rollback_to_a_given_number(registry: Registry) -> None:
    for _ in range(4):
        add_published(registry, TENANT)
    registry.rollouts.rollback(TENANT, 2, actor="me")
    assert served(registry) == 2
    with pytest.raises(NotFoundError, match=r"acme/support@4 was not published before.*\(1 were\)"):
        registry.rollouts.rollback(TENANT, 4, actor="me")
    registry.rollouts.rollback(TENANT, actor="me")
    assert served(registry) == 1


def test_a_tenant_without_earlier_publications_cannot_be_rolled_back(registry: Registry) -> None:
    add_ready(registry, TENANT)
    with pytest.raises(ConflictError, match="nothing to roll back to"):
        registry.rollouts.rollback(TENANT, actor="me")
    registry.rollouts.publish(TENANT, 1, actor="me")
    with pytest.raises(ConflictError, match="nothing to roll back to"):
        registry.rollouts.rollback(TENANT, actor="me")


def test_the_name_and_history_of_a_retired_tenant_remain(registry: Registry) -> None:
    add_published(registry, TENANT)
    add_published(registry, TENANT)
    rollout = registry.rollouts.retire(TENANT, actor="me", expected=2)
    assert (rollout.kind, rollout.tenants, rollout.revisions) == ("retire", (TENANT,), ())
    assert (served(registry), registry.tenants.get(TENANT).state) == (None, "retired")
    assert states(registry) == ["superseded", "retired"]
    snapshot = registry.snapshot()
    assert (snapshot.tenants, snapshot.revisions, snapshot.previous) == ((), (), ())
    assert len(registry.audit.page(target=TENANT, action="tenant.publish").entries) == 2
    for change in (
        lambda: registry.rollouts.publish(TENANT, 1, actor="me"),
        lambda: registry.rollouts.rollback(TENANT, actor="me"),
        lambda: registry.revisions.add(TENANT, profile(), actor="me"),
        lambda: registry.tenants.freeze(TENANT, actor="me"),
        lambda: registry.tenants.set_limits(TENANT, {}, actor="me"),
        lambda: registry.rollouts.retire(TENANT, actor="me"),
        lambda: registry.tenants.add(TENANT, FAMILY, actor="me"),
    ):
        with pytest.raises(ConflictError, match="retired"):
            change()


def test_revisions_below_the_floor_are_neither_published_nor_rolled_back_to(
    registry: Registry,
) -> None:
    add_published(registry, TENANT, 0.5)
    add_ready(registry, TENANT, 0.75)
    add_published(registry, TENANT, 2.0)
    assert registry.policies.set_floor(HEADER.digest, {0: 1.0}, actor="op") is None
    below = r"acme/support@2 is below the floor of its family: layer 0 has 0.75, the floor is 1.0"
    with pytest.raises(BoundsError, match=below):
        registry.rollouts.publish(TENANT, 2, actor="me")
    with pytest.raises(BoundsError, match="acme/support@1 is below the floor"):
        registry.rollouts.rollback(TENANT, actor="me")
    with pytest.raises(BoundsError, match="tenant 'acme/support' is below the floor"):
        registry.revisions.add(TENANT, profile(0.75), actor="me")
    assert (served(registry), states(registry)) == (3, ["superseded", "ready", "published"])
