"""A replica whose registry was restored: what it read before is no longer valid, and ids and names
may stand for other content. The world is that of the replica's own tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from metrics_setup import growth
from registry_setup import back_up, copy_sqlite
from sqlalchemy import update
from test_replica_fetches import Slow
from test_replica_reconciler import World, run, until, world

from safegene_server.access.catalog import View, key_digest
from safegene_server.access.models import resolve
from safegene_server.registry import Registry, Revision, tables
from safegene_server.replica.retention import RESTORED
from safegene_vllm import tiny_model
from safegene_vllm.errors import ReceiptError, RestoredError
from safegene_vllm.formats.profile import load_profile, make_profile, profile_json

__all__ = ["world"]


def restored(world: World, restore: Callable[[], None], *then: Callable[[], Any]) -> None:
    """Restore the registry and change it in another way, before any poll."""
    with world.replica._history._lock:
        restore()
        for change in then:
            change()
    world.models.restores = getattr(world.models, "restores", 0) + 1


def watched(world: World) -> list[tuple[View, dict[int, Any], tuple[str, ...]]]:
    """Every view from now on, with the engine's adapters at that time, and the problems."""
    views: list[tuple[View, dict[int, Any], tuple[str, ...]]] = []
    replace = world.catalog.replace

    def seen(view: View) -> None:
        views.append((view, dict(world.engine.loaded), world.replica.problems()))
        replace(view)

    world.catalog.replace = seen  # type: ignore[method-assign]
    return views


def coefficient(world: World, number: int) -> float:
    """The coefficient that the engine really has under this id."""
    return load_profile(world.engine.loaded[number].path).coefficients[0]


async def level(world: World) -> None:
    """Wait until the state of the registry is served and reported."""
    await until(lambda: world.replica._losses >= getattr(world.models, "restores", 0))
    await until(lambda: world.replica.version == world.registry.version())
    await until(lambda: world.replica.problems() == ())

    def reported() -> bool:
        live = [one for one in world.registry.replicas.list() if one.id == world.replica.id]
        current = [one.applied_version for one in live] == [world.registry.version()]
        return current and not world.replica._reporter._stale

    await until(reported)


@pytest.mark.parametrize("more", [0, 1, 2, 6])
def test_a_key_that_is_revoked_after_a_restore_is_rejected(world: World, more: int) -> None:
    """Whether the version is smaller than before then, the same, or larger."""
    world.publish("acme", 0.5)
    lost = world.registry.keys.add("lost", scopes=["serve"], tenants=["acme"], actor="t")

    def keys() -> set[str]:
        return {principal.name for principal in world.catalog.view.keys.values()}

    async def change() -> None:
        retained = world.registry.keys.add(
            "retained", scopes=["serve"], tenants=["acme"], actor="t"
        )
        restore = back_up(world.registry)
        for value in (0.6, 0.7, 0.8):
            world.publish("acme", value)
        new = world.registry.keys.add("new", scopes=["serve"], tenants=["acme"], actor="t")
        await level(world)
        assert keys() == {"lost", "retained", "new"}
        ahead = world.replica.version
        restored(
            world,
            restore,
            lambda: world.registry.keys.revoke("retained", actor="t"),
            *[
                lambda step=step: world.registry.tenants.set_limits(  # type: ignore[misc]
                    "acme", {"concurrent": step + 1}, actor="t"
                )
                for step in range(more)
            ],
        )
        took_s = await until(lambda: keys() == {"lost"})
        assert key_digest(retained.secret) not in world.catalog.view.keys
        assert key_digest(new.secret) not in world.catalog.view.keys
        await level(world)
        assert world.replica.version == ahead - 3 + more
        assert world.served("acme") == "acme@1" and world.replica.lag.seconds() == 0.0
        assert world.replica.lag.known == world.replica.version
        assert world.catalog.view.tenants["acme"].limits.concurrent == (more or None)
        world.registry.keys.revoke("lost", actor="t")
        took_s = min(took_s, await until(lambda: keys() == set()))
        assert took_s < 60.0 and lost.key.name == "lost"

    with growth() as grown:
        run(world, change)
    assert grown.by("safegene_registry_losses_total") == 1


def test_an_id_and_a_name_with_other_content_are_loaded_again(world: World) -> None:
    """Nothing of the old content is offered under its name in between, nor is the new before it is
    in the engine in its place."""
    world.publish("acme", 0.5)
    same = world.publish("globex", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        old = world.publish("acme", 0.6)
        await level(world)
        before = world.engine.loaded[old.id]
        views, new = watched(world), []
        restored(world, restore, lambda: new.append(world.publish("acme", 0.9)))
        (revision,) = new
        assert (revision.id, revision.served_name) == (old.id, "acme@2")
        await level(world)
        assert world.served("acme") == "acme@2" and coefficient(world, revision.id) == 0.9
        after = world.engine.loaded[revision.id]
        assert after.path != before.path, "the prefix cache is keyed by name and path"
        assert world.models.lora_requests["acme@2"] is after
        log = [line for line in world.engine.log if line.endswith("acme@2")]
        assert log == ["add acme@2", "forget acme@2", "remove acme@2", "add acme@2"]
        offered = [held[old.id] for view, held, _ in views if view.tenants["acme"].served]
        assert offered and all(request is after for request in offered)
        assert all(problems for view, _, problems in views if not view.tenants["acme"].served)
        # What is the same content is not touched.
        assert world.engine.log.count("add globex@1") == 1
        assert world.served("globex") == same.served_name
        receipts = {
            r.revision: r for r in world.registry.replicas.receipts(replica=world.replica.id)
        }
        assert receipts.keys() == world.engine.loaded.keys()
        assert world.registry.rollouts.status(world.registry.rollouts.list()[0].id).done

    run(world, change)


def test_names_and_ids_that_have_changed_places(world: World) -> None:
    world.publish("acme", 0.5)
    world.publish("globex", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        before = [world.publish("acme", 0.6), world.publish("globex", 0.7)]
        await level(world)
        after: list[Revision] = []
        restored(
            world,
            restore,
            lambda: after.append(world.publish("globex", 0.7)),
            lambda: after.append(world.publish("acme", 0.6)),
        )
        assert [r.id for r in after] == [r.id for r in before]
        assert {r.served_name for r in after} == {r.served_name for r in before}
        await level(world)
        assert {n: r.name for n, r in world.engine.loaded.items() if n > 2} == {
            revision.id: revision.served_name for revision in after
        }
        assert [coefficient(world, revision.id) for revision in after] == [0.7, 0.6]

    run(world, change)


def test_what_runs_on_the_old_content_ends_before_the_new_is_loaded(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        new_key = world.registry.keys.add("k", scopes=["serve"], tenants=["acme"], actor="t")
        restore = back_up(world.registry)
        old = world.publish("acme", 0.6)
        await level(world)
        principal = world.catalog.view.keys[key_digest(new_key.secret)]
        slot = world.counters.admit(resolve(world.catalog.view, principal, "acme"), 0)
        restored(world, restore, lambda: world.publish("acme", 0.9))
        await until(lambda: world.served("acme") is None)
        with world.replica.in_use("acme@2"):
            await until(
                lambda: any("acme@2 (id 2" in problem for problem in world.replica.problems())
            )
            slot.close(0)
            await asyncio.sleep(0.5)
            assert coefficient(world, old.id) == 0.6 and world.served("acme") is None
            assert world.replica.problems() and world.replica.version == 0
            (row,) = world.registry.replicas.list()
            assert row.applied_version == 0 and row.faults
            assert world.registry.replicas.receipts(replica=row.id, revision=old.id) == ()
        await level(world)
        assert world.served("acme") == "acme@2" and coefficient(world, old.id) == 0.9

    run(world, change)


def test_what_the_registry_does_not_know_is_no_longer_published(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is, rather than that, while what the registry publishes is being fetched."""
    slow = Slow(world, monkeypatch)
    first = world.add("acme", 0.5, source="slow")
    world.registry.rollouts.publish("acme", first.number, actor="t")
    restore = back_up(world.registry)
    for value in (0.6, 0.7, 0.8):
        world.publish("acme", value)

    async def change() -> None:
        await level(world)
        assert world.served("acme") == "acme@4" and not slow.begun.is_set()
        restored(world, restore)
        await until(lambda: world.served("acme") is None)
        await until(lambda: "acme@1: its adapter is being downloaded" in world.replica.problems())
        await until(lambda: not world.engine.loaded)
        assert world.models.lora_requests == {} and world.replica.version == 0
        slow.release.set()
        await level(world)
        assert world.served("acme") == "acme@1"

    run(world, change)


def test_a_fetch_for_an_id_is_a_fetch_of_its_content(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch of the content that the id had before ends, and its failure is not this one's."""
    slow = Slow(world, monkeypatch)
    family = tiny_model.write_family(world.root / "m", world.root / "f3")
    tiny_model.write_tenant(world.root / "m", world.root / "third", family, None, seed=3)
    world.publish("acme", 0.5)

    def publish(source: str) -> None:
        added = world.add("acme", 0.6, source=source)
        world.registry.rollouts.publish("acme", added.number, actor="t")

    async def change() -> None:
        restore = back_up(world.registry)
        publish("slow")
        old = world.registry.revisions.get("acme", 2)
        await until(slow.begun.is_set)
        restored(world, restore, lambda: publish("third"))
        await level(world)
        assert slow.stopped.is_set() and not world.replica.artifacts.fetches
        new = world.registry.revisions.get("acme", 2)
        assert (new.id, new.profile.digest) == (old.id, old.profile.digest)
        assert new.adapter_digest != old.adapter_digest and world.served("acme") == "acme@2"
        weights = "adapter_model.safetensors"
        held = (world.engine.loaded[new.id].path / weights).read_bytes()
        assert held == (world.root / "third" / weights).read_bytes()

    run(world, change)


def test_new_content_that_fails_leaves_nothing_under_the_name(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        world.publish("acme", 0.6)
        await level(world)
        world.engine.reject.add("acme@2")
        restored(world, restore, lambda: world.publish("acme", 0.9))
        await until(
            lambda: any("holds another row" in problem for problem in world.replica.problems())
        )
        assert world.served("acme") is None and "acme@2" not in world.models.lora_requests
        assert [request.name for request in world.engine.loaded.values()] == ["acme@1"]
        world.engine.reject.clear()
        await world.replica.reconcile()
        assert world.served("acme") == "acme@2" and world.replica.problems() == ()

    run(world, change)


def test_it_is_not_ready_as_soon_as_the_restore_is_noticed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stays so while the registry cannot be read."""
    world.publish("acme", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        world.publish("acme", 0.6)
        await level(world)
        async with world.replica._lock:
            restore()
            await until(lambda: world.replica.problems() == (RESTORED,))
            assert world.replica._state()[0] == 0
        await level(world)
        assert world.served("acme") == "acme@1"

    run(world, change)


def test_it_joins_again_with_all_that_it_holds(world: World) -> None:
    """Its row and its receipts are those of the backup; also if nothing else was lost."""
    first = world.publish("acme", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        before = world.replica.id
        assert world.registry.replicas.receipts(replica=before)
        for value in (0.6, 0.7):
            world.publish("acme", value)
            await level(world)
        await until(lambda: first.id not in world.engine.loaded)
        restored(world, restore)
        await level(world)
        assert world.served("acme") == "acme@1" and world.replica.id != before
        (row,) = world.registry.replicas.list()
        assert [r.replica for r in world.registry.replicas.receipts()] == [row.id]
        version, known = world.registry.version(), world.replica.id
        restore = back_up(world.registry)
        world.registry.jobs.enqueue("gate", "acme", actor="t")
        await until(lambda: world.replica._history.poll().losses == 1)
        restored(world, restore)
        await until(lambda: world.replica.id != known)
        await level(world)
        assert world.registry.version() == version
        assert [r.revision for r in world.registry.replicas.receipts(replica=world.replica.id)] == [
            first.id
        ]

    run(world, change)


def test_a_registry_without_its_family_is_given_it_again(world: World) -> None:
    empty = world.root / "empty.sqlite"
    Registry(empty).close()
    world.publish("acme", 0.5)

    async def change() -> None:
        await level(world)
        restored(world, lambda: copy_sqlite(empty, str(world.registry.database.url.database)))
        await level(world)
        assert [family.digest for family in world.registry.families.list()] == [world.header.digest]
        assert world.catalog.view.tenants == {} and world.catalog.view.keys == {}
        await until(lambda: not world.engine.loaded)

    run(world, change)


def test_a_candidate_of_other_content_replaces_the_old(world: World) -> None:
    """Of what was served, before that was noticed; of another candidate, once that is over."""
    world.publish("acme", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        old = world.publish("acme", 0.6)
        await level(world)
        with world.replica._history._lock:
            restore()
            new = world.add("acme", 0.9)
        assert new.id == old.id
        await world.replica.load(new)
        assert coefficient(world, new.id) == 0.9 and world.served("acme") == "acme@1"
        await level(world)
        with world.replica._history._lock:
            restore()
            third = world.add("acme", 0.7)
        assert third.id == old.id
        loading = asyncio.create_task(world.replica.load(third))
        await asyncio.sleep(0.5)
        assert not loading.done() and coefficient(world, new.id) == 0.9
        await world.replica.unload(new)
        await asyncio.wait_for(loading, 300)
        assert coefficient(world, third.id) == 0.7
        await world.replica.unload(new)
        assert coefficient(world, third.id) == 0.7, (
            "the end of another candidate is not the end of this one"
        )
        await world.replica.unload(third)
        assert third.id not in world.engine.loaded

    run(world, change)


def test_content_of_a_lost_registry_does_not_drive_out_what_is_published(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        old = world.add("acme", 0.6)
        world.replica._history.poll()
        restored(world, restore, lambda: world.publish("acme", 0.9))
        await level(world)
        with pytest.raises(RestoredError, match=r"acme@2 .* cannot be loaded while the engine"):
            await asyncio.wait_for(world.replica.load(old), 300)
        assert world.served("acme") == "acme@2" and coefficient(world, old.id) == 0.9
        assert old.identity not in world.replica._retention.under_test

    run(world, change)


def test_a_candidate_that_waits_too_long_is_reported(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safegene_server.replica.reconciler.DRAIN_S", 0.3)
    world.publish("acme", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        old = world.add("acme", 0.6)
        await world.replica.load(old)
        restore()
        new = world.add("acme", 0.9)
        with pytest.raises(RestoredError, match=f"while the engine holds acme@2 .id {old.id}"):
            await asyncio.wait_for(world.replica.load(new), 300)
        assert coefficient(world, old.id) == 0.6
        await world.replica.unload(old)
        await world.replica.load(new)
        assert coefficient(world, new.id) == 0.9

    run(world, change)


def test_the_engine_is_idle_before_a_revision_is_unloaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine drops a cancelled request shortly after it has ended here."""
    world.publish("acme", 0.5)
    ended: list[float] = []

    async def change() -> None:
        new_key = world.registry.keys.add("k", scopes=["serve"], tenants=["acme"], actor="t")
        restore = back_up(world.registry)
        world.publish("acme", 0.6)
        await level(world)
        principal = world.catalog.view.keys[key_digest(new_key.secret)]
        slot = world.counters.admit(resolve(world.catalog.view, principal, "acme"), 0)
        restored(world, restore, lambda: world.publish("acme", 0.9))
        await until(lambda: world.served("acme") is None)
        clock, remove = asyncio.get_running_loop().time, world.engine.remove_lora

        async def removed(number: int) -> None:
            ended.append(clock())
            await remove(number)

        world.engine.remove_lora = removed  # type: ignore[method-assign]
        slot.close(0)
        begun = clock()
        await level(world)
        assert ended and ended[0] - begun >= 0.2

    run(world, change)


def test_an_engine_that_retains_the_old_content_is_a_problem(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        restore = back_up(world.registry)
        world.publish("acme", 0.6)
        await level(world)
        remove, failed = world.engine.remove_lora, asyncio.Event()

        async def stuck(number: int) -> None:
            failed.set()
            raise ReceiptError("the engine cannot unload it")

        world.engine.remove_lora = stuck  # type: ignore[method-assign]
        restored(world, restore, lambda: world.publish("acme", 0.9))
        await asyncio.wait_for(failed.wait(), 300)
        assert world.served("acme") is None and world.replica.problems()
        world.engine.remove_lora = remove  # type: ignore[method-assign]
        await world.replica.reconcile()
        await level(world)
        assert world.served("acme") == "acme@2" and coefficient(world, 2) == 0.9

    run(world, change)


def test_content_that_was_changed_behind_the_registry_is_recognized_as_well(world: World) -> None:
    """No entry was lost, so only the content itself shows it."""
    revision = world.publish("acme", 0.5)
    other = profile_json(make_profile(world.header, [0.9, 1.0], {"method": "test"}))

    async def change() -> None:
        await level(world)
        views = watched(world)
        with world.registry.database.write("another") as write:
            rows = tables.revisions
            write.connection.exec_driver_sql("DROP TRIGGER revisions_fixed")
            write.connection.execute(
                update(rows)
                .where(rows.c.id == revision.id)
                .values(profile=other, profile_digest=other["digest"])
            )
            write.skip_audit()
        world.registry.tenants.set_limits("acme", {"concurrent": 1}, actor="t")
        await until(lambda: world.served("acme") is None)
        await until(lambda: world.served("acme") == "acme@1")
        assert coefficient(world, revision.id) == 0.9
        assert [view.tenants["acme"].served for view, _, _ in views] == [None, "acme@1"]
        assert all(problems == (RESTORED,) for _, _, problems in views)
        await level(world)
        assert world.replica._losses == 0

    run(world, change)
