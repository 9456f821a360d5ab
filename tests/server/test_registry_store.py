"""Snapshots: consistent during concurrent writes."""

from __future__ import annotations

import threading
from dataclasses import FrozenInstanceError, fields

import pytest
from registry_setup import FAMILY, add_published, add_ready, profile, registry, url

from safegene_server.registry import Registry

__all__ = ["registry", "url"]


def test_a_snapshot_contains_exactly_what_replicas_follow(registry: Registry) -> None:
    for name in ("globex", "retired"):
        registry.tenants.add(name, FAMILY, actor="me")
    first = add_published(registry, "acme/support", 1.0)
    second = add_published(registry, "acme/support", 2.0)
    add_ready(registry, "acme/support", 2.5)
    add_published(registry, "retired")
    registry.rollouts.retire("retired", actor="me")
    registry.revisions.add("globex", profile(), actor="me")
    registry.keys.add("valid", scopes=["serve"], tenants=["*"], actor="me")
    registry.keys.add("revoked", scopes=["serve"], tenants=["*"], actor="me")
    registry.keys.revoke("revoked", actor="me")
    snapshot = registry.snapshot()
    parts = {"version", "tenants", "revisions", "previous", "keys", "position", "lost"}
    assert {field.name for field in fields(snapshot)} == parts, "each is read at every change"
    assert snapshot.version == registry.version()
    assert [tenant.name for tenant in snapshot.tenants] == ["acme/support", "globex"]
    assert snapshot.revisions == (registry.revisions.get_by_id(second.id),)
    assert snapshot.previous == (registry.revisions.get_by_id(first.id),)
    assert snapshot.previous[0].state == "superseded"
    assert [key.name for key in snapshot.keys] == ["valid"]
    assert registry.snapshot() == snapshot
    with pytest.raises(FrozenInstanceError):
        snapshot.version = 0  # type: ignore[misc]


def test_a_snapshot_is_consistent(registry: Registry) -> None:
    """Both tenants are switched by one floor each time, so they are never seen apart."""
    registry.tenants.add("globex", FAMILY, actor="me")
    names = ("acme/support", "globex")
    for name in names:
        add_published(registry, name, 0.0)
    stop = threading.Event()
    failed: list[BaseException] = []

    def write() -> None:
        try:
            for step in range(1, 25):
                registry.policies.set_floor(FAMILY, {0: step / 16}, actor="op")
        except BaseException as error:
            failed.append(error)
        finally:
            stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen: dict[int, float] = {}
    while not stop.is_set():
        snapshot = registry.snapshot()
        assert sorted(revision.tenant for revision in snapshot.revisions) == list(names)
        strengths = {revision.profile.coefficients[0] for revision in snapshot.revisions}
        assert len(strengths) == 1
        assert {tenant.published for tenant in snapshot.tenants} == {
            revision.number for revision in snapshot.revisions
        }
        strength = strengths.pop()
        assert seen.setdefault(snapshot.version, strength) == strength
    writer.join()
    assert failed == []
    assert len(seen) > 2
    assert registry.snapshot().revisions[0].profile.coefficients[0] == 24 / 16


def test_the_version_counts_followed_changes(registry: Registry) -> None:
    start = registry.version()
    add_ready(registry, "acme/support")
    assert registry.version() == start
    registry.rollouts.publish("acme/support", 1, actor="me")
    assert registry.version() == start + 1
