"""Restored registries: the next read detects the restore, whatever was written since."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from registry_setup import (
    FAMILY,
    add_published,
    add_ready,
    back_up,
    postgres,
    profile,
    registry,
    url,
)
from sqlalchemy import text

from safegene_server.registry import History, Position, Registry, Seen, watch
from safegene_server.replica.loops import listen
from safegene_vllm.errors import ConflictError, NotFoundError, RegistryDownError, RestoredError

__all__ = ["registry", "url"]

TENANT = "acme/support"


def change(registry: Registry, times: int = 1) -> None:
    """Changes that replicas follow."""
    for step in range(times):
        registry.tenants.set_limits(TENANT, {"concurrent": step + 1}, actor="op")


def test_a_registry_that_continues_has_lost_nothing(registry: Registry) -> None:
    history = History(registry)
    start = registry.version()
    assert history.poll() == history.poll() == Seen(start, 0)
    change(registry, 3)
    registry.replicas.join("node", 1, actor="node")
    assert history.poll() == Seen(start + 3, 0)
    snapshot, losses = history.snapshot()
    assert (snapshot.version, snapshot.lost, losses) == (start + 3, False, 0)
    assert history.position == snapshot.position == registry.position()[0]


@pytest.mark.parametrize("since", [0, 2, 3, 9])
@pytest.mark.parametrize("by", ["poll", "snapshot"])
def test_a_restored_registry_is_detected_once(
    registry: Registry, since: int, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if the version is as high as before, or higher, by the next read."""
    history = History(registry)
    restore = back_up(registry)
    start = registry.version()
    change(registry, 3)
    assert history.poll() == Seen(start + 3, 0)
    restore()
    change(registry, since)
    if by == "poll":
        assert history.poll() == Seen(start + since, 1)
    else:
        snapshot, losses = history.snapshot()
        assert (snapshot.version, snapshot.lost, losses) == (start + since, True, 1)
    assert f"version {start + 3} then, {start + since} now" in caplog.text
    change(registry)
    assert history.poll() == Seen(start + since + 1, 1)
    assert caplog.text.count("has lost changes") == 1


def test_lost_changes_that_replicas_do_not_follow_are_detected_too(registry: Registry) -> None:
    """Ids of unpublished revisions, jobs and receipts may be assigned again."""
    history = History(registry)
    restore = back_up(registry)
    registry.revisions.add(TENANT, profile(), actor="me")
    version = registry.version()
    assert history.poll() == Seen(version, 0)
    restore()
    assert history.poll() == Seen(version, 1)


def test_another_registry_does_not_contain_a_position(registry: Registry) -> None:
    seen, _ = registry.position()
    assert registry.position(seen) == (seen, False)
    assert seen.entry is not None
    number, at, actor, action, target = seen.entry
    for other in (
        Position(seen.version + 1, seen.entry),
        Position(seen.version, (number + 1, at, actor, action, target)),
        Position(seen.version, (number, at.replace(year=2000), actor, action, target)),
        Position(seen.version, (number, at, "other", action, target)),
        Position(seen.version, (number, at, actor, "key.add", target)),
        Position(seen.version, (number, at, actor, action, "globex")),
    ):
        assert registry.position(other) == (seen, True)
        assert registry.snapshot(other).lost
    assert not registry.snapshot(Position(0, None)).lost


@pytest.mark.parametrize("since", [0, 3])
def test_a_watcher_reports_a_restore_within_a_poll(registry: Registry, since: int) -> None:
    history, stop = History(registry), threading.Event()
    reported: queue.Queue[Seen] = queue.Queue()

    def run() -> None:
        for seen in watch(history, stop, poll_s=0.05):
            reported.put(seen)

    restore = back_up(registry)
    change(registry, 3)
    thread = threading.Thread(target=run)
    thread.start()
    version = registry.version()
    assert reported.get(timeout=300) == Seen(version, 0)
    # Nothing is read until it is as far again.
    with history._lock:
        restore()
        change(registry, since)
    assert reported.get(timeout=300) == Seen(version - 3 + since, 1)
    change(registry)
    assert reported.get(timeout=300) == Seen(version - 2 + since, 1)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_watch_survives_unexpected_errors(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread that died in silence would follow nothing any more."""
    monkeypatch.setattr("safegene_server.replica.loops.RETRY_S", 0.01)
    stop, heard = threading.Event(), queue.Queue[Seen]()
    poll: Callable[[History], Seen] = History.poll
    failed = threading.Event()

    def fail_once(history: History) -> Seen:
        if not failed.is_set():
            failed.set()
            raise ValueError("a malformed row")
        return poll(history)

    monkeypatch.setattr(History, "poll", fail_once)
    thread = threading.Thread(target=listen, args=(History(registry), stop, heard.put))
    thread.start()
    assert heard.get(timeout=300) == Seen(registry.version(), 0)
    assert "cannot watch the registry" in caplog.text
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_registry_that_is_being_restored_is_down(registry: Registry) -> None:
    with registry.database.write("admin") as write:
        write.connection.execute(text("DELETE FROM version"))
        write.skip_audit()
    with pytest.raises(RegistryDownError, match="being restored"):
        registry.position()
    with registry.database.write("admin", exclusive=False) as write:
        write.connection.execute(text("DROP TABLE version"))
        write.skip_audit()
    for read in (registry.position, registry.version, registry.snapshot):
        with pytest.raises(RegistryDownError, match="does not respond"):
            read()


def test_a_heartbeat_from_a_lost_position_is_rejected(registry: Registry) -> None:
    restore = back_up(registry)
    replica = registry.replicas.join("node", 1, actor="node").id
    seen, _ = registry.position()
    reported = registry.replicas.heartbeat(
        replica, applied_version=seen.version, seen=seen, actor="node"
    )
    assert reported.applied_version == seen.version
    ahead, _ = registry.position()
    restore()
    with pytest.raises(NotFoundError, match="join again"):
        registry.replicas.heartbeat(replica, applied_version=seen.version, seen=ahead, actor="node")
    again = registry.replicas.join("node", 1, actor="node").id
    for lost in (seen, ahead, replace(seen, version=seen.version + 1, entry=None)):
        with pytest.raises(RestoredError, match="has seen changes that the registry has lost"):
            registry.replicas.heartbeat(
                again, applied_version=seen.version, seen=lost, actor="node"
            )
    (row,) = registry.replicas.list()
    assert (row.id, row.applied_version) == (again, 0)
    now, _ = registry.position()
    registry.replicas.heartbeat(again, applied_version=now.version, seen=now, actor="node")


def test_a_receipt_of_other_content_is_left_out(registry: Registry) -> None:
    restore = back_up(registry)
    old = add_published(registry, TENANT, 1.0)
    lost = add_published(registry, TENANT, 1.5)
    restore()
    new = add_published(registry, TENANT, 2.0)
    assert (new.id, new.served_name) == (old.id, old.served_name)
    assert new.identity != old.identity
    replica = registry.replicas.join("node", 1, actor="node").id

    def report(*held: object) -> list[int]:
        contents = [one.identity for one in held]  # type: ignore[attr-defined]
        registry.replicas.heartbeat(
            replica,
            applied_version=registry.version(),
            receipts={content.id: ({"of": content.profile}, True) for content in contents},
            contents=contents,
            actor="node",
        )
        return [receipt.revision for receipt in registry.replicas.receipts(replica=replica)]

    rollout = registry.rollouts.list()[0]
    assert report(new) == [new.id]
    assert registry.rollouts.status(rollout.id).done
    # What it holds now is not what it reported, and the registry does not know the other at all.
    assert report(old, lost) == []
    (lag,) = registry.rollouts.status(rollout.id).lagging
    assert lag.reason == f"has no receipt for {new.served_name}"


def test_a_version_from_before_a_restore_does_not_count_as_applied(registry: Registry) -> None:
    revision = add_published(registry, TENANT)
    rollout = registry.rollouts.list()[0]
    replica = registry.replicas.join("node", 1, actor="node").id
    ahead = registry.version() + 5
    good = {revision.id: ({}, True)}
    registry.replicas.heartbeat(replica, applied_version=ahead, receipts=good, actor="node")
    (lag,) = registry.rollouts.status(rollout.id).lagging
    assert f"is at version {ahead} of the registry before it was restored" in lag.reason
    assert (registry.stats().live, registry.stats().late) == (0, 1)


@pytest.mark.parametrize("step", ["publish", "publish a new one", "ready", "rollback"])
def test_only_the_checked_content_is_published(registry: Registry, step: str) -> None:
    """A check that took minutes says nothing of other content that has the id and the name now."""
    first = add_published(registry, TENANT, 0.5)
    restore = back_up(registry)
    checked = add_ready(registry, TENANT, 1.0)
    restore()
    other = registry.revisions.add(TENANT, profile(2.0), actor="other")
    assert (other.id, other.served_name) == (checked.id, checked.served_name)
    if step != "ready":
        registry.revisions.set_state(other.id, "ready", actor="other")
    if step == "rollback":
        registry.rollouts.publish(TENANT, other.number, actor="other")
        third = add_published(registry, TENANT, 2.5)
        assert registry.snapshot().previous == (registry.revisions.get(TENANT, other.number),)
    version, serving = registry.version(), registry.revisions.published(TENANT)
    with pytest.raises(ConflictError, match="the registry was restored meanwhile"):
        if step == "publish":
            registry.rollouts.publish(TENANT, checked.number, actor="me", checked=checked.identity)
        elif step == "publish a new one":
            registry.rollouts.publish(
                TENANT, other.number, actor="me", gate={}, checked=checked.identity
            )
        elif step == "rollback":
            registry.rollouts.rollback(TENANT, checked.number, actor="me", checked=checked.identity)
        else:
            registry.revisions.set_state(checked.id, "ready", actor="me", checked=checked.identity)
    assert (registry.version(), registry.revisions.published(TENANT)) == (version, serving)
    if step == "publish":
        registry.rollouts.publish(TENANT, other.number, actor="me", checked=other.identity)
    elif step == "rollback":
        registry.rollouts.rollback(TENANT, actor="me", checked=other.identity)
        assert third.number != registry.tenants.get(TENANT).published == other.number
    elif step == "ready":
        registry.revisions.set_state(other.id, "ready", actor="me", checked=other.identity)
    assert registry.revisions.get(TENANT, 1).identity == first.identity


def test_the_family_is_part_of_a_revisions_identity(registry: Registry) -> None:
    revision = add_ready(registry, TENANT, adapter_digest="sha256:" + "ad" * 32)
    found = revision.identity
    assert (found.id, found.name, found.family) == (revision.id, f"{TENANT}@1", FAMILY)
    assert (found.adapter, found.profile) == (revision.adapter_digest, revision.profile.digest)
    other = replace(revision.profile, family="sha256:" + "e" * 64)
    assert replace(revision, profile=other).identity.profile != found.profile


def test_listening_resumes_after_a_restore() -> None:
    server = postgres()
    opened = Registry(server.url(server.create("migrated")))
    history, stop, heard = History(opened), threading.Event(), queue.Queue[Seen]()
    restore = back_up(opened)
    thread = threading.Thread(target=listen, args=(history, stop, heard.put))
    thread.start()
    assert heard.get(timeout=300) == Seen(0, 0)
    opened.keys.add("k", scopes=["serve"], tenants=["*"], actor="t")
    assert heard.get(timeout=300) == Seen(1, 0)
    restore()
    opened.keys.add("other", scopes=["serve"], tenants=["*"], actor="t")
    while (seen := heard.get(timeout=300)) != Seen(1, 1):
        assert seen == Seen(0, 1)
    stop.set()
    opened.keys.add("last", scopes=["serve"], tenants=["*"], actor="t")
    thread.join(300)
    assert not thread.is_alive()
    opened.close()
