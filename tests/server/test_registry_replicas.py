"""Replicas: which are alive, what each has applied, and the progress of rollouts."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from registry_setup import add_published, registry, url
from sqlalchemy import update

from safegene_server.registry import Registry, replicas, tables
from safegene_vllm.errors import NotFoundError, RegistryError

__all__ = ["registry", "url"]

TENANT = "acme/support"


def last_seen(registry: Registry, replica: str, ago_s: float) -> None:
    """As if a replica had been silent since then."""
    with registry.database.write("test") as write:
        then = write.now - timedelta(seconds=ago_s)
        row = tables.replicas
        write.connection.execute(update(row).where(row.c.id == replica).values(seen_at=then))
        write.skip_audit()


def test_the_life_cycle_of_a_replica(registry: Registry) -> None:
    joined = registry.replicas.join("node-1", 4711, actor="node-1")
    assert uuid.UUID(joined.id).version == 4
    assert (joined.host, joined.pid, joined.applied_version, joined.faults) == (
        "node-1",
        4711,
        0,
        (),
    )
    reported = registry.replicas.heartbeat(
        joined.id, applied_version=3, faults=["no disk"], actor="node-1"
    )
    assert (reported.applied_version, reported.faults) == (3, ("no disk",))
    assert reported.seen_at >= joined.seen_at
    assert registry.replicas.list() == (reported,)
    registry.replicas.leave(joined.id, actor="node-1")
    assert registry.replicas.list() == ()
    for call in (
        lambda: registry.replicas.heartbeat(joined.id, applied_version=3, actor="node-1"),
        lambda: registry.replicas.leave(joined.id, actor="node-1"),
    ):
        with pytest.raises(NotFoundError, match="join again"):
            call()


def test_heartbeats_are_audited_when_their_content_changed(registry: Registry) -> None:
    replica = registry.replicas.join("node-1", 1, actor="node-1").id
    for version in (0, 0, 1, 1, 1, 2):
        registry.replicas.heartbeat(replica, applied_version=version, actor="node-1")
    registry.replicas.heartbeat(replica, applied_version=2, faults=["slow"], actor="node-1")
    entries = registry.audit.page(action="replica.state").entries
    assert [entry.details["version"] for entry in entries] == [2, 2, 1]
    revision = add_published(registry, TENANT)
    reported = {revision.id: ({"rank": 0}, True)}
    registry.replicas.heartbeat(
        replica, applied_version=2, faults=["slow"], receipts=reported, actor="node-1"
    )
    assert [r.revision for r in registry.replicas.receipts(replica=replica)] == [revision.id]
    registry.replicas.heartbeat(
        replica, applied_version=2, faults=["slow"], gone=[revision.id], actor="node-1"
    )
    assert registry.replicas.receipts(replica=replica) == ()
    assert len(registry.audit.page(action="replica.receipts").entries) == 2
    assert len(registry.audit.page(action="replica.state").entries) == 3
    with pytest.raises(RegistryError, match="applied_version -1"):
        registry.replicas.heartbeat(replica, applied_version=-1, actor="node-1")


def test_a_silent_replica_does_not_count_and_is_deleted_later(registry: Registry) -> None:
    silent = registry.replicas.join("node-1", 1, actor="node-1").id
    alive = registry.replicas.join("node-2", 2, actor="node-2").id
    assert [one.id for one in registry.replicas.list()] == [silent, alive]
    last_seen(registry, silent, replicas.ALIVE_S + 60)
    assert [one.id for one in registry.replicas.list()] == [alive]
    assert [one.id for one in registry.replicas.list(alive_s=1000)] == [silent, alive]
    last_seen(registry, silent, replicas.RETENTION_S + 1)
    registry.replicas.join("node-3", 3, actor="node-3")
    assert registry.audit.page(action="replica.join").entries[0].details["forgotten"] == [silent]
    with pytest.raises(NotFoundError):
        registry.replicas.heartbeat(silent, applied_version=0, actor="node-1")


def test_receipts_are_replaced_one_by_one(registry: Registry) -> None:
    first, second = add_published(registry, TENANT), add_published(registry, TENANT)
    one, two = (registry.replicas.join(host, 1, actor=host).id for host in ("node-1", "node-2"))

    def put(replica: str, receipts: dict[int, Any], gone: Sequence[int] = ()) -> None:
        registry.replicas.heartbeat(
            replica, applied_version=0, receipts=receipts, gone=gone, actor="node"
        )

    put(one, {first.id: ({"rank": 0}, False)})
    put(two, {second.id: ({"rank": 7}, True)})
    put(one, {first.id: ({"rank": 1}, True), second.id: ({"rank": 2}, True)})
    found = [(r.revision, dict(r.receipt), r.ok) for r in registry.replicas.receipts(replica=one)]
    assert found == [(first.id, {"rank": 1}, True), (second.id, {"rank": 2}, True)]
    put(one, {}, gone=[first.id])
    assert [r.revision for r in registry.replicas.receipts(replica=one)] == [second.id]
    assert {r.replica for r in registry.replicas.receipts(revision=second.id)} == {one, two}
    with pytest.raises(NotFoundError, match=r"no revisions with ids \[99\]"):
        put(one, {99: ({}, True), second.id: ({}, False)})
    with pytest.raises(RegistryError, match="receipt is not plain JSON"):
        put(one, {second.id: ({"norm": float("inf")}, True)})
    assert all(r.ok for r in registry.replicas.receipts())
    registry.replicas.leave(one, actor="node-1")
    assert [r.replica for r in registry.replicas.receipts()] == [two]


def test_a_rollout_is_followed_by_k_of_n(registry: Registry) -> None:
    revision = add_published(registry, TENANT)
    rollout = registry.rollouts.list()[0]
    assert not registry.rollouts.status(rollout.id).done
    ids = [registry.replicas.join(f"node-{n}", n, actor="test").id for n in range(4)]
    at = rollout.version
    good, bad = ({revision.id: ({}, ok)} for ok in (True, False))
    registry.replicas.heartbeat(ids[1], applied_version=at, receipts=good, actor="test")
    registry.replicas.heartbeat(
        ids[2], applied_version=at, faults=["rank 1 is silent"], receipts=bad, actor="test"
    )
    registry.replicas.heartbeat(ids[3], applied_version=at, actor="test")
    status = registry.rollouts.status(rollout.id)
    assert (status.rollout, status.applied, status.live) == (rollout, 1, 4)
    assert status.revisions == (registry.revisions.get(TENANT, 1),)
    assert {lag.replica.id: lag.reason for lag in status.lagging} == {
        ids[0]: f"is at version 0, needs {rollout.version}; has no receipt for acme/support@1",
        ids[2]: "has a receipt for acme/support@1 that differs from its files; rank 1 is silent",
        ids[3]: "has no receipt for acme/support@1",
    }
    assert not status.done
    for replica in ids:
        registry.replicas.heartbeat(replica, applied_version=at, receipts=good, actor="test")
    status = registry.rollouts.status(rollout.id)
    assert (status.applied, status.live, status.lagging, status.done) == (4, 4, (), True)


def test_a_dead_replica_does_not_block_a_rollout(registry: Registry) -> None:
    revision = add_published(registry, TENANT)
    rollout = registry.rollouts.list()[0]
    dead = registry.replicas.join("dead", 1, actor="test").id
    alive = registry.replicas.join("alive", 2, actor="test").id
    registry.replicas.heartbeat(
        alive,
        applied_version=rollout.version,
        receipts={revision.id: ({}, True)},
        actor="test",
    )
    assert registry.rollouts.status(rollout.id).live == 2
    last_seen(registry, dead, replicas.ALIVE_S + 60)
    status = registry.rollouts.status(rollout.id)
    assert (status.applied, status.live, status.done) == (1, 1, True)


def test_a_superseded_rollout_needs_no_receipts(
    registry: Registry,
) -> None:
    first, second = add_published(registry, TENANT), add_published(registry, TENANT)
    newer, older = registry.rollouts.list()
    assert (older.revisions, newer.revisions) == ((first.id,), (second.id,))
    replica = registry.replicas.join("node", 1, actor="test").id
    registry.replicas.heartbeat(replica, applied_version=newer.version, actor="test")
    assert registry.rollouts.status(older.id).done
    assert not registry.rollouts.status(newer.id).done
    retired = registry.rollouts.retire(TENANT, actor="test")
    assert not registry.rollouts.status(retired.id).done
    registry.replicas.heartbeat(replica, applied_version=retired.version, actor="test")
    assert registry.rollouts.status(retired.id).done


def test_rollouts_are_listed_newest_first(registry: Registry) -> None:
    for _ in range(3):
        add_published(registry, TENANT)
    listed = registry.rollouts.list(limit=2)
    assert [one.version for one in listed] == sorted((one.version for one in listed), reverse=True)
    assert len(listed) == 2
    with pytest.raises(NotFoundError, match="no rollout 99"):
        registry.rollouts.status(99)
