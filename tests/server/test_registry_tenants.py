"""Families and tenants: adding, limits and freezes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry_setup import FAMILY, HEADER, add_published, add_ready, header, profile, registry, url

from safegene_server.registry import Registry, validation
from safegene_server.registry.family_json import header_json, parse_header
from safegene_vllm.errors import ConflictError, FrozenError, NotFoundError, RegistryError

__all__ = ["registry", "url"]


def test_a_family_is_read_as_it_was_added(registry: Registry) -> None:
    family = registry.families.get(FAMILY)
    assert family.header == HEADER
    assert (family.name, family.source) == ("tiny", "s3://bucket/family")
    assert family.created_at.utcoffset() is not None
    assert registry.families.list() == (family,)
    assert parse_header(header_json(HEADER)) == HEADER


def test_a_family_may_be_added_again_but_not_changed(registry: Registry) -> None:
    version = registry.version()
    assert registry.families.add(HEADER, "elsewhere", actor="me") == registry.families.get(FAMILY)
    with pytest.raises(ConflictError, match="with another header"):
        registry.families.add(replace(HEADER, bounds=(0.0, 9.0)), None, actor="me")
    with pytest.raises(RegistryError, match="digest"):
        registry.families.add(replace(HEADER, digest="md5:1"), None, actor="me")
    assert registry.version() == version
    registry.families.add(header("second", "e"), None, actor="me")
    assert [family.name for family in registry.families.list()] == ["tiny", "second"]


def test_a_tenant_is_read_as_it_was_added(registry: Registry) -> None:
    added = registry.tenants.add("globex", FAMILY, actor="me", limits={"concurrent": 3})
    assert added == registry.tenants.get("globex")
    assert (added.name, added.family, added.source) == ("globex", FAMILY, None)
    assert (added.state, added.limits, added.published) == ("active", {"concurrent": 3}, None)
    assert [tenant.name for tenant in registry.tenants.list()] == ["acme/support", "globex"]
    assert registry.tenants.get("acme/support").source == "/adapters/acme"


def test_invalid_tenants_are_rejected(registry: Registry) -> None:
    with pytest.raises(ConflictError, match="'acme/support' exists and is active"):
        registry.tenants.add("acme/support", FAMILY, actor="me")
    with pytest.raises(NotFoundError, match="add it first"):
        registry.tenants.add("globex", "sha256:" + "0" * 64, actor="me")
    with pytest.raises(RegistryError, match="reserved for the base model"):
        registry.tenants.add("base", FAMILY, actor="me")
    with pytest.raises(NotFoundError, match="no tenant 'globex'"):
        registry.tenants.get("globex")


def test_a_tenant_that_never_served_is_restarted(registry: Registry) -> None:
    before = registry.tenants.add("globex", FAMILY, actor="me", source="/a")
    registry.rollouts.retire("globex", actor="me")
    after = registry.tenants.restart("globex", FAMILY, actor="me", source="/b", limits={})
    assert (after.id, after.state, after.source) == (before.id, "active", "/b")
    job = registry.jobs.enqueue("onboard", "globex", actor="me")
    with pytest.raises(ConflictError, match=f"job {job.id} is in progress"):
        registry.tenants.restart("globex", FAMILY, actor="me")
    registry.jobs.cancel(job.id, actor="me")
    registry.tenants.freeze("globex", actor="me")
    with pytest.raises(FrozenError, match="unfreeze"):
        registry.tenants.restart("globex", FAMILY, actor="me")
    registry.tenants.unfreeze("globex", actor="me")
    other = header("second", "e").digest
    registry.families.add(header("second", "e"), None, actor="me")
    with pytest.raises(ConflictError, match=f"exists for family {FAMILY}"):
        registry.tenants.restart("globex", other, actor="me")
    add_published(registry, "globex")
    for retired in (False, True):
        if retired:
            registry.rollouts.retire("globex", actor="me")
        with pytest.raises(ConflictError, match="exists and is"):
            registry.tenants.restart("globex", FAMILY, actor="me")


@pytest.mark.parametrize(
    "name",
    [
        *("", "-a", ".a", ":a", "_a", "a/", "/a", "a//b", "a/b/c", "a@1", "@candidate/0", "a b"),
        *("a\n", "a" * 97, "a" * 64 + "/" + "b" * 63, "a/../b", "a\u202eb", "a\u0301", "*", None),
    ],
)
def test_invalid_tenant_names(name: str) -> None:
    with pytest.raises(RegistryError, match="tenant name"):
        validation.tenant_name(name)


@pytest.mark.parametrize(
    "name",
    ["Acme/Support", "meta-llama/Llama-3.1-8B-sft", "llama3:acme", "Société", "客服/中文", "1+1"],
)
def test_names_of_other_systems_are_names(name: str) -> None:
    assert validation.tenant_name(name) == name


@given(st.from_regex(r"\A[a-zA-Z0-9][a-z0-9._:+-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62})?\Z"))
def test_names_of_tenants(name: str) -> None:
    if name == "base":
        return
    assert validation.tenant_name(name) == name
    assert validation.served_name(name, 17) == f"{name}@17"


def test_limits_are_replaced_as_a_whole(registry: Registry) -> None:
    registry.tenants.set_limits(
        "acme/support", {"concurrent": 2, "tokens_per_minute": 9}, actor="me"
    )
    after = registry.tenants.set_limits("acme/support", {"requests_per_minute": 5}, actor="me")
    assert after.limits == registry.tenants.get("acme/support").limits == {"requests_per_minute": 5}


@pytest.mark.parametrize("limits", [{"speed": 1}, {"concurrent": 0}, {"concurrent": True}])
def test_invalid_limits_are_rejected(registry: Registry, limits: dict[str, int]) -> None:
    with pytest.raises(RegistryError, match="expected whole numbers from 1 for concurrent"):
        registry.tenants.set_limits("acme/support", limits, actor="me")


def test_a_frozen_tenant_is_served_but_cannot_be_changed(registry: Registry) -> None:
    add_published(registry, "acme/support")
    second = add_ready(registry, "acme/support", 2.0)
    third = registry.revisions.add("acme/support", profile(3.0), actor="me")
    registry.rollouts.publish("acme/support", second.number, actor="me")
    before = registry.snapshot()
    assert registry.tenants.freeze("acme/support", actor="op").state == "frozen"
    version = registry.version()
    registry.tenants.freeze("acme/support", actor="op")
    assert registry.version() == version
    for change in (
        lambda: registry.revisions.add("acme/support", profile(), actor="me"),
        lambda: registry.rollouts.publish("acme/support", 1, actor="me"),
        lambda: registry.rollouts.rollback("acme/support", actor="me"),
        lambda: registry.rollouts.retire("acme/support", actor="me"),
    ):
        with pytest.raises(FrozenError, match="'acme/support' is frozen; unfreeze it"):
            change()
    assert registry.snapshot().revisions == before.revisions
    # A running check may still report its result.
    assert registry.revisions.set_state(third.id, "ready", actor="gate").state == "ready"
    registry.tenants.unfreeze("acme/support", actor="op")
    registry.rollouts.rollback("acme/support", actor="me")
    assert registry.tenants.get("acme/support").published == 1


def test_a_frozen_family_freezes_exactly_its_tenants(registry: Registry) -> None:
    other = header("second", "e")
    registry.families.add(other, None, actor="me")
    registry.tenants.add("globex", other.digest, actor="me")
    add_ready(registry, "acme/support")
    assert registry.policies.freeze(FAMILY, actor="op").frozen
    with pytest.raises(FrozenError, match=r"family sha256:f+ is frozen, and tenant 'acme/support'"):
        registry.rollouts.publish("acme/support", 1, actor="me")
    with pytest.raises(FrozenError, match="tenant 'initech'"):
        registry.tenants.add("initech", FAMILY, actor="me")
    own = replace(profile(), family=other.digest)
    assert registry.revisions.add("globex", own, actor="me").number == 1
    # Unfreezing the tenant is not unfreezing the family.
    registry.tenants.unfreeze("acme/support", actor="op")
    with pytest.raises(FrozenError):
        registry.rollouts.publish("acme/support", 1, actor="me")
    assert not registry.policies.unfreeze(FAMILY, actor="op").frozen
    registry.rollouts.publish("acme/support", 1, actor="me")
