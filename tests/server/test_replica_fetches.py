"""A replica whose sources are slow or broken, and what it retains on its disk.

The world is that of the replica's own tests, with a store that has nothing yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from metrics_setup import growth
from test_replica_reconciler import World, run, until, world

from safegene_server.access.catalog import key_digest
from safegene_server.artifacts import Store
from safegene_vllm import tiny_model
from safegene_vllm.errors import SourceError

__all__ = ["world"]


class Slow:
    """`release` unblocks the slow source; `fail` makes it fail then. Other sources are as ever."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        family = tiny_model.write_family(world.root / "m", world.root / "f2")
        tiny_model.write_tenant(world.root / "m", world.root / "slow", family, None, seed=2)
        self.release, self.fail, self.begun, self.stopped = (threading.Event() for _ in range(4))
        store = Store(world.root / "other-store")
        stage: Callable[..., Any] = store.stage

        def wait(source: str, **more: Any) -> Any:
            if Path(source).name == "slow":
                self.begun.set()
                while not self.release.wait(0.01):
                    if more["watch"].cancelled.is_set():
                        self.stopped.set()
                        raise SourceError("stopped")
                if self.fail.is_set():
                    raise SourceError("the slow source is broken")
            return stage(source, **more)

        monkeypatch.setattr(store, "stage", wait)
        world.replica.artifacts.store = store


@pytest.fixture
def slow(world: World, monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(world, monkeypatch)


def test_a_slow_source_delays_its_own_revision_and_nothing_else(
    world: World, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safegene_server.replica.reconciler.BEAT_S", 0.05)
    world.publish("acme", 0.5)

    async def change() -> None:
        former = world.publish("globex", 0.5)
        await until(lambda: world.served("globex") == "globex@1")
        new = world.add("globex", 0.7, source="slow")
        world.registry.rollouts.publish("globex", new.number, actor="t")
        new_key = world.registry.keys.add("k", scopes=["serve"], tenants=["acme"], actor="t")
        await until(lambda: key_digest(new_key.secret) in world.catalog.view.keys)
        world.registry.tenants.set_limits("globex", {"concurrent": 3}, actor="t")
        await until(lambda: world.catalog.view.tenants["globex"].limits.concurrent == 3)
        world.publish("acme", 0.6)
        await until(lambda: world.served("acme") == "acme@2")
        assert slow.begun.is_set() and world.served("globex") == "globex@1"
        assert world.replica.problems() == (), "it serves on as before, and is behind"
        assert world.replica.lag.seconds() > 0.0
        assert world.replica.version < world.registry.version()
        (seen,) = world.registry.replicas.list()
        await until(lambda: world.registry.replicas.list()[0].seen_at > seen.seen_at)
        await world.replica.load(former)
        slow.release.set()
        await until(lambda: world.served("globex") == "globex@2")
        await until(lambda: world.replica.lag.seconds() == 0.0)

    run(world, change)


def test_a_start_waits_for_slow_sources_only_so_long(
    world: World, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safegene_server.replica.reconciler.FETCH_S", 0.05)
    world.publish("acme", 0.5)
    new = world.add("globex", 0.7, source="slow")
    world.registry.rollouts.publish("globex", new.number, actor="t")

    async def look() -> None:
        assert "globex@1: its adapter is being downloaded" in world.replica.problems()
        await until(lambda: world.served("acme") == "acme@1")
        assert world.replica.problems() and world.served("globex") is None
        slow.release.set()
        await until(lambda: world.served("globex") == "globex@1")
        await until(lambda: world.replica.problems() == ())

    run(world, look)


def test_a_fetch_that_failed_is_begun_again_and_named_meanwhile(world: World, slow: Slow) -> None:
    world.replica.artifacts.fetches.retry_s = 0.05
    slow.release.set()
    slow.fail.set()
    new = world.add("globex", 0.7, source="slow")
    world.registry.rollouts.publish("globex", new.number, actor="t")

    async def look() -> None:
        assert world.replica.problems() == ("globex@1: the slow source is broken",)
        slow.fail.clear()
        await until(lambda: world.served("globex") == "globex@1")
        await until(lambda: world.replica.problems() == ())

    run(world, look)


def test_a_fetch_without_a_waiter_is_stopped(world: World, slow: Slow) -> None:
    world.publish("globex", 0.5)

    async def change() -> None:
        new = world.add("globex", 0.7, source="slow")
        world.registry.rollouts.publish("globex", new.number, actor="t")
        await until(slow.begun.is_set)
        world.registry.rollouts.rollback("globex", actor="t")
        await until(slow.stopped.is_set)
        await until(lambda: world.replica.lag.seconds() == 0.0)
        assert world.served("globex") == "globex@1" and not world.replica.artifacts.fetches

    run(world, change)


def test_a_stop_ends_what_is_being_fetched(
    world: World, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safegene_server.replica.reconciler.FETCH_S", 0.05)
    new = world.add("globex", 0.7, source="slow")
    world.registry.rollouts.publish("globex", new.number, actor="t")
    run(world)
    assert slow.stopped.wait(5.0)


def test_a_revision_s_time_is_its_own(world: World) -> None:
    """Independent of another revision's failure and of the age of an older version."""
    now_s = 100.0
    world.replica.lag.clock = lambda: now_s
    world.publish("acme", 0.5)
    snapshot = world.registry.snapshot

    def lasting(seen: Any) -> Any:
        nonlocal now_s
        now_s += 0.5
        return snapshot(seen)

    async def change() -> None:
        nonlocal now_s
        world.engine.reject = {"globex@1"}
        world.publish("globex", 0.5)
        await world.replica.reconcile()
        now_s += 1000.0
        world.registry.snapshot = lasting  # type: ignore[method-assign]
        with growth() as grown:
            world.publish("acme", 0.9)
            await world.replica.reconcile()
        assert grown.by("safegene_revision_apply_seconds_sum") == pytest.approx(0.5)
        assert world.served("acme") == "acme@2"
        with growth() as grown:
            world.engine.reject = set()
            await world.replica.reconcile()
        assert grown.by("safegene_revision_apply_seconds_sum") > 1000.0

    run(world, change)


def test_a_revision_unused_for_a_day_is_removed_from_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safegene_server.replica.reconciler.CLEAN_S", 0.05)
    store = world.store.root

    def on_disk() -> set[str]:
        return {path.name for path in (store / "revisions").iterdir()}

    def directory(world: World, number: int) -> Path:
        known = world.registry.revisions.get("acme", number)
        return world.store.revision(known.adapter_digest, known.profile)

    world.publish("acme", 0.5)

    async def change() -> None:
        for value in (0.6, 0.7):
            world.publish("acme", value)
            await world.replica.reconcile()
        tried = world.add("acme", 0.8)
        await world.replica.load(tried)
        staged = world.add("acme", 0.9)
        places = {number: directory(world, number) for number in range(1, 6)}
        await until(lambda: "remove acme@1" in world.engine.log)
        (adapter,) = (store / "adapters").iterdir()

        def old_is_removed() -> bool:
            """Makes them old again and again: a pass that began before may touch them still."""
            if places[1].name not in on_disk():
                return True
            for path in (*(places[number] for number in (2, 3, 4)), adapter):
                os.utime(path, (0, 0))
            with suppress(FileNotFoundError):
                os.utime(places[1], (0, 0))
            return False

        await until(old_is_removed)
        assert on_disk() == {places[number].name for number in (2, 3, 4, staged.number)}
        assert adapter.exists()
        await until(lambda: all(places[n].stat().st_mtime > 0 for n in (2, 3, 4)))

    run(world, change)
