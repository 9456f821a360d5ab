"""The audit: every public write leaves its row, no row ever changes, and pages miss none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from registry_setup import FAMILY, add_published, add_ready, header, profile, registry, url
from sqlalchemy import delete, update
from sqlalchemy.exc import DBAPIError

from safegene_server.registry import Registry, tables
from safegene_server.registry.database import Database
from safegene_vllm.errors import RegistryError

__all__ = ["registry", "url"]

TENANT = "acme/support"


def public(cls: type) -> dict[str, Callable[..., Any]]:
    return {
        name: method
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") and name not in vars(Database)
    }


def takes_actor(method: Callable[..., Any]) -> bool:
    return "actor" in inspect.signature(method).parameters


WRITES = {name for name, method in public(Registry).items() if takes_actor(method)} - {"audit"}
READS = set(public(Registry)) - WRITES


def two_published(registry: Registry) -> None:
    add_published(registry, TENANT)
    add_published(registry, TENANT)


def joined(registry: Registry) -> str:
    return registry.join("node", 1, actor="setup").id


def job(registry: Registry, *, claimed: bool = False) -> int:
    added = registry.enqueue("gate", TENANT, actor="setup").id
    if claimed:
        assert registry.claim("w", actor="setup") is not None
    return added


def key(registry: Registry) -> str:
    return registry.add_key("ci", scopes=["read"], tenants=[TENANT], actor="setup").key.name


Prepare = Callable[[Registry], Any]
Act = Callable[[Registry, Any], Any]
NOTHING: Prepare = lambda registry: None  # noqa: E731

# Write method -> what it needs, the call as actor `auditor`, the action and the target it leaves.
CASES: dict[str, tuple[Prepare, Act, str, str]] = {
    "add_family": (
        NOTHING,
        lambda r, _: r.add_family(header("second", "e"), "src", actor="auditor"),
        "family.add",
        "sha256:" + "e" * 64,
    ),
    "set_floor": (
        NOTHING,
        lambda r, _: r.set_floor(FAMILY, {0: 0.5}, actor="auditor"),
        "family.floor",
        FAMILY,
    ),
    "freeze_family": (
        NOTHING,
        lambda r, _: r.freeze_family(FAMILY, actor="auditor"),
        "family.freeze",
        FAMILY,
    ),
    "unfreeze_family": (
        lambda r: r.freeze_family(FAMILY, actor="setup"),
        lambda r, _: r.unfreeze_family(FAMILY, actor="auditor"),
        "family.unfreeze",
        FAMILY,
    ),
    "add_tenant": (
        NOTHING,
        lambda r, _: r.add_tenant("globex", FAMILY, actor="auditor"),
        "tenant.add",
        "globex",
    ),
    "set_limits": (
        NOTHING,
        lambda r, _: r.set_limits(TENANT, {"concurrent": 1}, actor="auditor"),
        "tenant.limits",
        TENANT,
    ),
    "freeze_tenant": (
        NOTHING,
        lambda r, _: r.freeze_tenant(TENANT, actor="auditor"),
        "tenant.freeze",
        TENANT,
    ),
    "unfreeze_tenant": (
        lambda r: r.freeze_tenant(TENANT, actor="setup"),
        lambda r, _: r.unfreeze_tenant(TENANT, actor="auditor"),
        "tenant.unfreeze",
        TENANT,
    ),
    "add_revision": (
        NOTHING,
        lambda r, _: r.add_revision(TENANT, profile(), actor="auditor"),
        "revision.add",
        f"{TENANT}@1",
    ),
    "set_revision_state": (
        lambda r: r.add_revision(TENANT, profile(), actor="setup").id,
        lambda r, it: r.set_revision_state(it, "failed", reasons=["bad"], actor="auditor"),
        "revision.failed",
        f"{TENANT}@1",
    ),
    "publish": (
        lambda r: add_ready(r, TENANT),
        lambda r, _: r.publish(TENANT, 1, actor="auditor"),
        "tenant.publish",
        f"{TENANT}@1",
    ),
    "rollback": (
        two_published,
        lambda r, _: r.rollback(TENANT, actor="auditor"),
        "tenant.rollback",
        f"{TENANT}@1",
    ),
    "retire": (
        two_published,
        lambda r, _: r.retire(TENANT, actor="auditor"),
        "tenant.retire",
        TENANT,
    ),
    "add_key": (
        NOTHING,
        lambda r, _: r.add_key("ci", scopes=["read"], tenants=[], actor="auditor"),
        "key.add",
        "ci",
    ),
    "rotate_key": (key, lambda r, it: r.rotate_key(it, actor="auditor"), "key.rotate", "ci"),
    "revoke_key": (key, lambda r, it: r.revoke_key(it, actor="auditor"), "key.revoke", "ci"),
    "join": (NOTHING, lambda r, _: r.join("node", 1, actor="auditor"), "replica.join", ""),
    "heartbeat": (
        joined,
        lambda r, it: r.heartbeat(it, applied_version=1, actor="auditor"),
        "replica.state",
        "",
    ),
    "leave": (joined, lambda r, it: r.leave(it, actor="auditor"), "replica.leave", ""),
    "enqueue": (
        NOTHING,
        lambda r, _: r.enqueue("gate", TENANT, actor="auditor"),
        "job.enqueue",
        "job:1",
    ),
    "claim": (job, lambda r, _: r.claim("w", actor="auditor"), "job.claim", "job:1"),
    "progress": (
        lambda r: job(r, claimed=True),
        lambda r, it: r.progress(it, "w", 0.5, "half", actor="auditor"),
        "job.progress",
        "job:1",
    ),
    "finish": (
        lambda r: job(r, claimed=True),
        lambda r, it: r.finish(it, "w", "done", actor="auditor"),
        "job.done",
        "job:1",
    ),
    "release": (
        lambda r: job(r, claimed=True),
        lambda r, it: r.release(it, "w", actor="auditor"),
        "job.release",
        "job:1",
    ),
    "cancel": (job, lambda r, it: r.cancel(it, actor="auditor"), "job.cancel", "job:1"),
}
NOT_FOLLOWED = {"add_revision", "set_revision_state", "join", "heartbeat", "leave"}
NOT_FOLLOWED |= {"enqueue", "claim", "progress", "finish", "release", "cancel"}


def test_every_public_method_is_known_as_a_read_or_a_write() -> None:
    assert set(CASES) == WRITES
    assert {"snapshot", "version", "audit", "tenants", "rollout_status"} <= READS


@pytest.mark.parametrize("name", sorted(WRITES))
def test_every_write_leaves_its_row_and_moves_the_version_if_followed(
    registry: Registry, name: str
) -> None:
    prepare, act, action, target = CASES[name]
    given = prepare(registry)
    before = registry.snapshot()
    assert registry.audit(actor="auditor").entries == ()
    act(registry, given)
    after = registry.snapshot()
    entries = registry.audit(actor="auditor").entries
    assert [entry.action for entry in entries] == [action]
    assert not target or entries[0].target == target
    assert entries[0].actor == "auditor" and entries[0].at.utcoffset() == timedelta(0)
    # Exactly what replicas can see in a snapshot is what they are told of.
    followed = name not in NOT_FOLLOWED
    assert after.version == before.version + followed
    assert (after == before) is not followed
    if followed and "version" in entries[0].details:
        assert entries[0].details["version"] == after.version


@pytest.mark.parametrize("name", sorted(READS))
def test_reads_have_no_way_to_write(name: str) -> None:
    source = inspect.getsource(getattr(Registry, name))
    assert "self.read()" in source and "self.write(" not in source


def test_a_refused_write_leaves_no_row(registry: Registry) -> None:
    before = registry.audit()
    for call in (
        lambda: registry.publish(TENANT, 1, actor="auditor"),
        lambda: registry.add_tenant(TENANT, FAMILY, actor="auditor"),
        lambda: registry.revoke_key("none", actor="auditor"),
    ):
        with pytest.raises(RegistryError):
            call()
    assert registry.audit() == before


def test_rows_are_neither_changed_nor_deleted(registry: Registry) -> None:
    before = registry.audit()
    for statement in (update(tables.audit).values(actor="nobody"), delete(tables.audit)):
        with pytest.raises(DBAPIError, match="never"), registry.write("intruder") as write:
            write.connection.execute(statement)
    assert registry.audit() == before


def test_pages_go_back_through_everything_once(registry: Registry) -> None:
    for _ in range(3):
        two_published(registry)
    whole = registry.audit(limit=1000)
    assert whole.cursor is None and len(whole.entries) == 20
    ids = [entry.id for entry in whole.entries]
    assert ids == sorted(ids, reverse=True)
    read, cursor, pages = [], None, 0
    while pages == 0 or cursor is not None:
        page = registry.audit(limit=6, cursor=cursor)
        read += page.entries
        cursor, pages = page.cursor, pages + 1
    assert (tuple(read), pages) == (whole.entries, 4)
    for limit in (0, 1001):
        with pytest.raises(RegistryError, match="expected 1 to 1000"):
            registry.audit(limit=limit)


def test_filters(registry: Registry) -> None:
    registry.add_tenant("acme/support2", FAMILY, actor="somebody")
    registry.add_tenant("acme_support", FAMILY, actor="somebody")
    two_published(registry)
    add_published(registry, "acme/support2")
    mine = registry.audit(target=TENANT).entries
    assert {entry.target for entry in mine} == {TENANT, f"{TENANT}@1", f"{TENANT}@2"}
    assert [e.target for e in registry.audit(target="acme_support").entries] == ["acme_support"]
    assert {e.action for e in registry.audit(target=f"{TENANT}@1").entries} == {
        "revision.add",
        "revision.ready",
        "tenant.publish",
    }
    assert len(registry.audit(action="tenant.publish").entries) == 3
    kinds = {entry.action for entry in registry.audit(action="tenant.").entries}
    assert kinds == {"tenant.add", "tenant.publish"}
    assert len(registry.audit(actor="somebody", action="tenant.add").entries) == 2
    middle = mine[3].at
    early, late = registry.audit(until=middle).entries, registry.audit(since=middle).entries
    assert early and late and len(early) + len(late) == len(registry.audit().entries)
    assert max(e.at for e in early) < middle == min(e.at for e in late)
