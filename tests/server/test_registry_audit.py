"""Audit log: every public write adds its entry, entries never change, pages miss none."""

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
from safegene_server.registry.audit import AuditLog
from safegene_server.registry.families import Families
from safegene_server.registry.jobs import Jobs
from safegene_server.registry.keys import Keys
from safegene_server.registry.policies import Policies
from safegene_server.registry.replicas import Replicas
from safegene_server.registry.revisions import Revisions
from safegene_server.registry.rollouts import Rollouts
from safegene_server.registry.stats import read_stats
from safegene_server.registry.tenants import Tenants
from safegene_server.registry.usage import Usage
from safegene_vllm.errors import RegistryError

__all__ = ["registry", "url"]

TENANT = "acme/support"


REGISTRY_READS = {"version", "position", "snapshot", "stats"}
PARTS = {
    "families": Families,
    "tenants": Tenants,
    "revisions": Revisions,
    "rollouts": Rollouts,
    "policies": Policies,
    "keys": Keys,
    "replicas": Replicas,
    "jobs": Jobs,
    "audit": AuditLog,
    "usage": Usage,
}


def public_methods(cls: type) -> dict[str, Callable[..., Any]]:
    return {
        name: method
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


def takes_actor(method: Callable[..., Any]) -> bool:
    return "actor" in inspect.signature(method).parameters


METHODS = {
    f"{part}.{name}": method
    for part, cls in PARTS.items()
    for name, method in public_methods(cls).items()
}
WRITES = {name for name, method in METHODS.items() if takes_actor(method)} - {"audit.page"}
UNAUDITED = {"usage.add", "usage.delete_before"}
"""Writes of counts, which have no actor: see test_registry_usage."""
READS = METHODS.keys() - WRITES - UNAUDITED


def two_published(registry: Registry) -> None:
    add_published(registry, TENANT)
    add_published(registry, TENANT)


def joined(registry: Registry) -> str:
    return registry.replicas.join("node", 1, actor="setup").id


def job(registry: Registry, *, claimed: bool = False) -> int:
    added = registry.jobs.enqueue("gate", TENANT, actor="setup").id
    if claimed:
        assert registry.jobs.claim("w", actor="setup") is not None
    return added


def key(registry: Registry) -> str:
    return registry.keys.add("ci", scopes=["read"], tenants=[TENANT], actor="setup").key.name


Prepare = Callable[[Registry], Any]
Act = Callable[[Registry, Any], Any]
NOTHING: Prepare = lambda registry: None  # noqa: E731

# Write method -> what it needs, the call as actor `auditor`, the action and the target it leaves.
CASES: dict[str, tuple[Prepare, Act, str, str]] = {
    "families.add": (
        NOTHING,
        lambda r, _: r.families.add(header("second", "e"), "src", actor="auditor"),
        "family.add",
        "sha256:" + "e" * 64,
    ),
    "policies.set_floor": (
        NOTHING,
        lambda r, _: r.policies.set_floor(FAMILY, {0: 0.5}, actor="auditor"),
        "family.floor",
        FAMILY,
    ),
    "policies.freeze": (
        NOTHING,
        lambda r, _: r.policies.freeze(FAMILY, actor="auditor"),
        "family.freeze",
        FAMILY,
    ),
    "policies.unfreeze": (
        lambda r: r.policies.freeze(FAMILY, actor="setup"),
        lambda r, _: r.policies.unfreeze(FAMILY, actor="auditor"),
        "family.unfreeze",
        FAMILY,
    ),
    "tenants.add": (
        NOTHING,
        lambda r, _: r.tenants.add("globex", FAMILY, actor="auditor"),
        "tenant.add",
        "globex",
    ),
    "tenants.restart": (
        NOTHING,
        lambda r, _: r.tenants.restart(TENANT, FAMILY, source="/other", actor="auditor"),
        "tenant.restart",
        TENANT,
    ),
    "tenants.set_limits": (
        NOTHING,
        lambda r, _: r.tenants.set_limits(TENANT, {"concurrent": 1}, actor="auditor"),
        "tenant.limits",
        TENANT,
    ),
    "tenants.freeze": (
        NOTHING,
        lambda r, _: r.tenants.freeze(TENANT, actor="auditor"),
        "tenant.freeze",
        TENANT,
    ),
    "tenants.unfreeze": (
        lambda r: r.tenants.freeze(TENANT, actor="setup"),
        lambda r, _: r.tenants.unfreeze(TENANT, actor="auditor"),
        "tenant.unfreeze",
        TENANT,
    ),
    "revisions.add": (
        NOTHING,
        lambda r, _: r.revisions.add(TENANT, profile(), actor="auditor"),
        "revision.add",
        f"{TENANT}@1",
    ),
    "revisions.set_state": (
        lambda r: r.revisions.add(TENANT, profile(), actor="setup").id,
        lambda r, it: r.revisions.set_state(it, "failed", reasons=["bad"], actor="auditor"),
        "revision.failed",
        f"{TENANT}@1",
    ),
    "rollouts.publish": (
        lambda r: add_ready(r, TENANT),
        lambda r, _: r.rollouts.publish(TENANT, 1, actor="auditor"),
        "tenant.publish",
        f"{TENANT}@1",
    ),
    "rollouts.rollback": (
        two_published,
        lambda r, _: r.rollouts.rollback(TENANT, actor="auditor"),
        "tenant.rollback",
        f"{TENANT}@1",
    ),
    "rollouts.retire": (
        two_published,
        lambda r, _: r.rollouts.retire(TENANT, actor="auditor"),
        "tenant.retire",
        TENANT,
    ),
    "keys.add": (
        NOTHING,
        lambda r, _: r.keys.add("ci", scopes=["read"], tenants=[], actor="auditor"),
        "key.add",
        "ci",
    ),
    "keys.rotate": (key, lambda r, it: r.keys.rotate(it, actor="auditor"), "key.rotate", "ci"),
    "keys.revoke": (key, lambda r, it: r.keys.revoke(it, actor="auditor"), "key.revoke", "ci"),
    "replicas.join": (
        NOTHING,
        lambda r, _: r.replicas.join("node", 1, actor="auditor"),
        "replica.join",
        "",
    ),
    "replicas.heartbeat": (
        joined,
        lambda r, it: r.replicas.heartbeat(it, applied_version=1, actor="auditor"),
        "replica.state",
        "",
    ),
    "replicas.leave": (
        joined,
        lambda r, it: r.replicas.leave(it, actor="auditor"),
        "replica.leave",
        "",
    ),
    "jobs.enqueue": (
        NOTHING,
        lambda r, _: r.jobs.enqueue("gate", TENANT, actor="auditor"),
        "job.enqueue",
        "job:1",
    ),
    "jobs.claim": (job, lambda r, _: r.jobs.claim("w", actor="auditor"), "job.claim", "job:1"),
    "jobs.progress": (
        lambda r: job(r, claimed=True),
        lambda r, it: r.jobs.progress(it, "w", 0.5, "half", actor="auditor"),
        "job.progress",
        "job:1",
    ),
    "jobs.finish": (
        lambda r: job(r, claimed=True),
        lambda r, it: r.jobs.finish(it, "w", "done", actor="auditor"),
        "job.done",
        "job:1",
    ),
    "jobs.release": (
        lambda r: job(r, claimed=True),
        lambda r, it: r.jobs.release(it, "w", actor="auditor"),
        "job.release",
        "job:1",
    ),
    "jobs.cancel": (job, lambda r, it: r.jobs.cancel(it, actor="auditor"), "job.cancel", "job:1"),
}
NOT_FOLLOWED = {"revisions.add", "revisions.set_state"}
NOT_FOLLOWED |= {name for name in CASES if name.startswith(("replicas.", "jobs."))}


def test_every_public_method_is_classified_as_a_read_or_a_write(registry: Registry) -> None:
    parts = {n: type(part) for n, part in vars(registry).items() if n != "database"}
    assert parts == PARTS
    assert set(CASES) == WRITES
    assert {"audit.page", "tenants.list", "rollouts.status"} <= READS
    assert public_methods(Registry).keys() == REGISTRY_READS | {"close"}


@pytest.mark.parametrize("name", sorted(WRITES))
def test_every_write_adds_its_audit_entry_and_raises_the_version_if_followed(
    registry: Registry, name: str
) -> None:
    prepare, act, action, target = CASES[name]
    given = prepare(registry)
    before = registry.snapshot()
    assert registry.audit.page(actor="auditor").entries == ()
    act(registry, given)
    after = registry.snapshot()
    entries = registry.audit.page(actor="auditor").entries
    assert [entry.action for entry in entries] == [action]
    assert not target or entries[0].target == target
    assert entries[0].actor == "auditor" and entries[0].at.utcoffset() == timedelta(0)
    # Exactly what replicas can see in a snapshot is what raises the version.
    followed = name not in NOT_FOLLOWED
    assert after.version == before.version + followed
    assert (after == before) is not followed
    if followed and "version" in entries[0].details:
        assert entries[0].details["version"] == after.version


@pytest.mark.parametrize("name", sorted(READS))
def test_reads_use_read_transactions(name: str) -> None:
    source = inspect.getsource(METHODS[name])
    assert "self._database.read()" in source and "_database.write(" not in source


@pytest.mark.parametrize("name", sorted(REGISTRY_READS))
def test_reads_of_the_whole_registry_use_read_transactions(name: str) -> None:
    method = read_stats if name == "stats" else getattr(Registry, name)
    source = inspect.getsource(method)
    assert "database.read()" in source and "database.write(" not in source


def test_a_rejected_write_adds_no_audit_entry(registry: Registry) -> None:
    before = registry.audit.page()
    for call in (
        lambda: registry.rollouts.publish(TENANT, 1, actor="auditor"),
        lambda: registry.tenants.add(TENANT, FAMILY, actor="auditor"),
        lambda: registry.keys.revoke("none", actor="auditor"),
    ):
        with pytest.raises(RegistryError):
            call()
    assert registry.audit.page() == before


def test_audit_entries_cannot_be_changed_or_deleted(registry: Registry) -> None:
    before = registry.audit.page()
    for statement in (update(tables.audit).values(actor="intruder"), delete(tables.audit)):
        with pytest.raises(DBAPIError, match="never"), registry.database.write("intruder") as write:
            write.connection.execute(statement)
    assert registry.audit.page() == before


def test_pages_cover_every_entry_once(registry: Registry) -> None:
    for _ in range(3):
        two_published(registry)
    whole = registry.audit.page(limit=1000)
    assert whole.cursor is None and len(whole.entries) == 20
    ids = [entry.id for entry in whole.entries]
    assert ids == sorted(ids, reverse=True)
    read, cursor, pages = [], None, 0
    while pages == 0 or cursor is not None:
        page = registry.audit.page(limit=6, cursor=cursor)
        read += page.entries
        cursor, pages = page.cursor, pages + 1
    assert (tuple(read), pages) == (whole.entries, 4)
    for limit in (0, 1001):
        with pytest.raises(RegistryError, match="expected 1 to 1000"):
            registry.audit.page(limit=limit)


def test_filters(registry: Registry) -> None:
    registry.tenants.add("acme/support2", FAMILY, actor="other")
    registry.tenants.add("acme_support", FAMILY, actor="other")
    two_published(registry)
    add_published(registry, "acme/support2")
    mine = registry.audit.page(target=TENANT).entries
    assert {entry.target for entry in mine} == {TENANT, f"{TENANT}@1", f"{TENANT}@2"}
    assert [e.target for e in registry.audit.page(target="acme_support").entries] == [
        "acme_support"
    ]
    assert {e.action for e in registry.audit.page(target=f"{TENANT}@1").entries} == {
        "revision.add",
        "revision.ready",
        "tenant.publish",
    }
    assert len(registry.audit.page(action="tenant.publish").entries) == 3
    kinds = {entry.action for entry in registry.audit.page(action="tenant.").entries}
    assert kinds == {"tenant.add", "tenant.publish"}
    assert len(registry.audit.page(actor="other", action="tenant.add").entries) == 2
    middle = mine[3].at
    early, late = (
        registry.audit.page(until=middle).entries,
        registry.audit.page(since=middle).entries,
    )
    assert early and late and len(early) + len(late) == len(registry.audit.page().entries)
    assert max(e.at for e in early) < middle == min(e.at for e in late)
