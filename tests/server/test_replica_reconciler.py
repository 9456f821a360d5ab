"""A replica without an engine: what it loads, offers, drains, removes and reports, and when.

Registry and store are real; the engine is a fake that records its calls.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from metrics_setup import growth

from safegene_server.access.catalog import Catalog, key_digest
from safegene_server.access.limits import Counters
from safegene_server.access.models import resolve
from safegene_server.artifacts import Store
from safegene_server.error_responses import HIDDEN, EngineDownError
from safegene_server.registry import Position, Registry, Revision, Snapshot
from safegene_server.replica import InternalClient, Reconciler
from safegene_server.replica.view import principal_of_key
from safegene_vllm import tiny_model
from safegene_vllm.errors import ConfigError, ReceiptError, RegistryDownError, RegistryError
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.profile import load_profile, make_profile


@dataclass
class Engine:
    """Fake of the `EngineClient`. `reject` names revisions that no rank accepts."""

    header: FamilyHeader | None
    loaded: dict[int, Any] = field(default_factory=dict)
    reject: set[str] = field(default_factory=set)
    report_errors: tuple[str, ...] = ()
    log: list[str] = field(default_factory=list)

    @property
    def verifier(self) -> Any:
        settings = SimpleNamespace(family=Path("/f"))
        return SimpleNamespace(
            plan=SimpleNamespace(header=self.header, settings=settings),
            receipts=self.receipts,
            forget=lambda request: self.log.append(f"forget {request.name}"),
            report=self.report,
        )

    async def report(self) -> Any:
        return SimpleNamespace(faults=self.report_errors)

    async def receipts(self) -> list[dict[str, Any]]:
        adapters = [{"lora_int_id": i, "name": r.name} for i, r in self.loaded.items()]
        return [{"rank": 0, "adapters": adapters}]

    async def add(self, request: Any, profile: Any = None) -> list[dict[str, Any]]:
        assert profile == load_profile(request.path)
        if request.name in self.reject:
            raise ReceiptError(f"{request.name}: rank 0 holds another row")
        self.log.append(f"add {request.name}")
        self.loaded[request.id] = request
        return await self.receipts()

    async def remove_lora(self, number: int) -> None:
        self.log.append(f"remove {self.loaded.pop(number).name}")


@dataclass
class World:
    registry: Registry
    store: Store
    header: FamilyHeader
    engine: Engine
    replica: Reconciler
    catalog: Catalog
    counters: Counters
    root: Path
    models: Any

    def add(self, tenant: str, first: float, source: str = "acme") -> Revision:
        path = self.root / source
        if tenant not in {t.name for t in self.registry.tenants.list()}:
            self.registry.tenants.add(tenant, self.header.digest, source=str(path), actor="t")
        digest = self.store.stage(path, family=self.header).digest
        profile = make_profile(self.header, [first, 1.0], {"method": "test"})
        added = self.registry.revisions.add(
            tenant, profile, adapter_digest=digest, source=str(path), actor="t"
        )
        self.registry.revisions.set_state(added.id, "ready", actor="t")
        return added

    def publish(self, tenant: str, first: float) -> Revision:
        added = self.add(tenant, first)
        self.registry.rollouts.publish(tenant, added.number, actor="t")
        return added

    def served(self, tenant: str) -> str | None:
        found = self.catalog.view.tenants.get(tenant)
        return None if found is None else found.served


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    tiny_model.make_model("llama", tmp_path / "m")
    family = tiny_model.write_family(tmp_path / "m", tmp_path / "f")
    tiny_model.write_tenant(tmp_path / "m", tmp_path / "acme", family, None, seed=1)
    header = read_family_header(tmp_path / "f")
    registry, store = Registry(tmp_path / "r.sqlite"), Store(tmp_path / "store")
    engine, catalog, counters = Engine(header), Catalog(), Counters()
    models = SimpleNamespace(
        lora_requests={},
        base_model_paths=[SimpleNamespace(name="base-model")],
        model_config=SimpleNamespace(max_model_len=256),
    )
    replica = Reconciler(
        registry=registry,
        store=store,
        engine=engine,  # type: ignore[arg-type]
        models=models,
        catalog=catalog,
        counters=counters,
        internal_client=InternalClient(),
        make_request=lambda name, number, path: SimpleNamespace(name=name, id=number, path=path),
    )
    registry.families.add(header, None, actor="t")
    yield World(registry, store, header, engine, replica, catalog, counters, tmp_path, models)
    registry.close()


def run(world: World, *steps: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Start following, do the steps, stop."""

    async def whole() -> None:
        await world.replica.start(None)
        try:
            for step in steps:
                await step()
        finally:
            await world.replica.stop()

    asyncio.run(whole())


async def until(true: Callable[[], bool]) -> float:
    """Wait until it is true; how long it took."""
    begun_s = time.monotonic()
    async with asyncio.timeout(300):
        while not true():
            await asyncio.sleep(0.01)
    return time.monotonic() - begun_s


def test_it_needs_a_family(world: World) -> None:
    with pytest.raises(ConfigError, match="needs an engine with a family"):
        Reconciler(
            registry=world.registry,
            store=world.store,
            engine=Engine(None),  # type: ignore[arg-type]
            models=world.models,
            catalog=world.catalog,
            counters=world.counters,
            internal_client=InternalClient(),
            make_request=lambda *_: None,
        )


def test_what_is_published_is_loaded_before_it_is_named(world: World) -> None:
    first = world.publish("acme", 0.5)
    world.add("waiting", 0.7)

    async def look() -> None:
        assert world.served("acme") == "acme@1" and world.served("waiting") is None
        assert list(world.models.lora_requests) == ["acme@1"]
        assert world.replica.problems() == () and world.replica.version == world.registry.version()
        (held,) = world.registry.replicas.receipts(revision=first.id)
        assert held.ok and held.receipt["ranks"][0]["name"] == "acme@1"

    run(world, look)
    assert world.registry.replicas.list() == ()


def test_errors_reported_to_the_registry_name_no_path(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.publish("acme", 0.5)

    async def rejecting(request: Any, profile: Any) -> Any:
        raise ReceiptError(f"{request.path} holds another row")

    world.engine.add = rejecting  # type: ignore[method-assign]
    world.engine.report_errors = (f"{world.store.root} has drifted",)

    async def look() -> None:
        await world.replica._check_drift()
        (reported,) = world.registry.replicas.list()
        assert reported.faults == world.replica.problems() == (f"acme@1: {HIDDEN}", HIDDEN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safegene_server.replica.reconciler.DRIFT_S", 0.0)
        run(world, look)
    assert f"{world.store.root}/revisions" in caplog.text
    assert f"{world.store.root} has drifted" in caplog.text


def test_heartbeats_are_sent_between_the_adapters_of_a_long_change(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica without a heartbeat for ten seconds counts as dead."""
    monkeypatch.setattr("safegene_server.replica.heartbeat.BEAT_S", 0.0)
    first, second = world.publish("acme", 0.5), world.publish("globex", 0.5)
    reported: list[tuple[int, int]] = []

    async def look() -> None:
        assert reported == [(1, 0), (1, 1)]

    add = world.engine.add

    async def adding(request: Any, profile: Any) -> list[dict[str, Any]]:
        receipts = [len(world.registry.replicas.receipts(revision=r.id)) for r in (first, second)]
        reported.append((len(world.registry.replicas.list()), receipts[0]))
        assert receipts[1] == 0
        return await add(request, profile)

    world.engine.add = adding  # type: ignore[method-assign]
    run(world, look)


def test_what_is_published_how_late_it_is_and_how_long_it_took(world: World) -> None:
    changes: list[list[tuple[str, str]]] = []

    def changed() -> None:
        changes.append([(tenant, r.served_name) for tenant, r in world.replica.served()])

    world.replica.on_change = changed
    world.publish("acme", 0.5)
    world.publish("globex", 0.5)

    async def change() -> None:
        assert world.replica.lag.known == world.registry.version()
        world.engine.reject = {"acme@2"}
        world.publish("acme", 0.9)
        await world.replica.reconcile()
        assert world.replica.lag.known > world.replica.version
        assert world.replica.lag.seconds() > 0.0
        world.engine.reject = set()
        await world.replica.reconcile()
        assert world.replica.lag.seconds() == 0.0

    with growth() as grown:
        run(world, change)
    first = [("acme", "acme@1"), ("globex", "globex@1")]
    assert changes == [first, [("globex", "globex@1"), ("acme", "acme@2")]]
    assert grown.by("safegene_revision_apply_seconds_count") == 3


def test_changes_are_followed_without_a_notification(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        world.publish("acme", 0.9)
        took_s = [await until(lambda: world.served("acme") == "acme@2")]
        world.registry.rollouts.rollback("acme", actor="t")
        took_s.append(await until(lambda: world.served("acme") == "acme@1"))
        world.registry.rollouts.retire("acme", actor="t")
        took_s.append(await until(lambda: "acme" not in world.catalog.view.tenants))
        # The period of a poll is 0.5 s; a busy machine may take long for one.
        assert min(took_s) < 60.0
        await until(lambda: not world.engine.loaded)
        assert world.models.lora_requests == {}

    run(world, change)
    assert world.engine.log.count("add acme@1") == 1


def test_nothing_in_flight_loses_its_revision(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        new_key = world.registry.keys.add("k", scopes=["serve"], tenants=["acme"], actor="t")
        await world.replica.reconcile()
        principal = world.catalog.view.keys[key_digest(new_key.secret)]
        slot = world.counters.admit(resolve(world.catalog.view, principal, "acme"), 0)
        for value in (0.6, 0.7, 0.8):
            world.publish("acme", value)
            await world.replica.reconcile()
        assert world.served("acme") == "acme@4"
        in_flight_way_back_and_served = {"acme@1", "acme@3", "acme@4"}
        async with asyncio.timeout(300):
            while {r.name for r in world.engine.loaded.values()} != in_flight_way_back_and_served:
                await asyncio.sleep(0.01)
        slot.close(0)
        await until(lambda: "remove acme@1" in world.engine.log)
        assert "acme@1" not in world.models.lora_requests

    run(world, change)


def test_no_internal_request_loses_its_revision(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        assert world.replica.serving() == {"acme": "acme@1"}
        with world.replica.in_use("acme@1"):
            with world.replica.in_use("acme@1"):
                world.registry.rollouts.retire("acme", actor="t")
                await world.replica.reconcile()
                assert world.replica.serving() == {} and world.served("acme") is None
            await world.replica.reconcile()
            assert [request.name for request in world.engine.loaded.values()] == ["acme@1"]
            assert world.counters.accounts == {} and world.replica.in_flight() == 0
        await world.replica.reconcile()
        await until(lambda: world.engine.loaded == {})

    run(world, change)


def test_a_revision_that_no_rank_accepts_leaves_the_former_one_serving(world: World) -> None:
    world.publish("acme", 0.5)
    world.engine.reject.add("acme@2")

    async def change() -> None:
        world.publish("acme", 0.9)
        await world.replica.reconcile()
        assert world.served("acme") == "acme@1"
        assert any("acme@2" in problem for problem in world.replica.problems())
        (seen,) = world.registry.replicas.list()
        assert seen.applied_version < world.registry.version() and seen.faults
        world.engine.reject.clear()
        await world.replica.reconcile()
        assert world.served("acme") == "acme@2" and world.replica.problems() == ()

    run(world, change)


def test_a_first_revision_that_fails_is_not_served(world: World) -> None:
    world.publish("acme", 0.5)
    world.engine.reject.add("acme@1")

    async def look() -> None:
        assert world.served("acme") is None and world.models.lora_requests == {}
        assert world.replica.problems()

    run(world, look)


def test_another_machine_fetches_what_its_store_lacks(world: World, tmp_path: Path) -> None:
    world.publish("acme", 0.5)
    world.replica.artifacts.store = Store(tmp_path / "other-store")

    async def look() -> None:
        assert world.served("acme") == "acme@1"
        assert world.engine.loaded[1].path.is_relative_to(tmp_path / "other-store")

    run(world, look)


def test_a_source_that_changed_is_not_served_in_place_of_what_was_registered(
    world: World, tmp_path: Path
) -> None:
    family = tiny_model.write_family(tmp_path / "m", tmp_path / "f2")
    world.publish("acme", 0.5)
    tiny_model.write_tenant(tmp_path / "m", tmp_path / "acme", family, None, seed=2)
    world.replica.artifacts.store = Store(tmp_path / "other-store")

    async def look() -> None:
        assert world.served("acme") is None
        assert any("expected sha256:" in problem for problem in world.replica.problems())

    run(world, look)


def test_a_candidate_is_loaded_and_not_published(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        tried = world.add("acme", 0.9)
        await world.replica.load(tried)
        await world.replica.reconcile()
        assert world.served("acme") == "acme@1" and tried.id in world.engine.loaded
        await world.replica.unload(tried)
        assert tried.id not in world.engine.loaded
        again = world.add("acme", 0.95)
        await world.replica.load(again)
        world.registry.rollouts.publish("acme", again.number, actor="t")
        await world.replica.reconcile()
        await world.replica.unload(again)
        assert world.served("acme") == "acme@3" and again.id in world.engine.loaded

    run(world, change)


def test_a_registry_that_is_down_changes_nothing_that_is_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        def down(_seen: object) -> None:
            raise RegistryDownError("the database does not respond")

        monkeypatch.setattr(world.registry, "snapshot", down)
        with pytest.raises(RegistryDownError):
            await world.replica.reconcile()
        assert world.served("acme") == "acme@1"
        monkeypatch.undo()
        world.publish("acme", 0.6)
        await until(lambda: world.served("acme") == "acme@2")

    run(world, change)


def test_a_change_without_a_notification_is_polled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safegene_server.replica.reconciler.RETRY_S", 0.05)
    world.publish("acme", 0.5)
    snapshot, failed = world.registry.snapshot, threading.Event()

    def down_once(seen: Position | None) -> Snapshot:
        if not failed.is_set():
            failed.set()
            raise RegistryDownError("the database does not respond")
        return snapshot(seen)

    async def change() -> None:
        monkeypatch.setattr(world.registry, "snapshot", down_once)
        world.publish("acme", 0.6)
        await until(lambda: world.served("acme") == "acme@2")
        assert failed.is_set()

    run(world, change)


def test_a_failed_unload_is_reported_and_nothing_else_is_lost(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        tried = world.add("acme", 0.9)
        await world.replica.load(tried)
        await world.replica.reconcile()
        assert len(world.registry.replicas.receipts()) == 2
        remove = world.engine.remove_lora

        async def dead(number: int) -> None:
            raise EngineDownError("the engine is down")

        world.engine.remove_lora = dead  # type: ignore[method-assign]
        with pytest.raises(EngineDownError):
            await world.replica.unload(tried)
        world.engine.remove_lora = remove  # type: ignore[method-assign]
        assert set(world.models.lora_requests) == {"acme@1"}
        await world.replica.reconcile()
        assert [receipt.revision for receipt in world.registry.replicas.receipts()] == [1]

    run(world, change)


def test_drift_makes_it_unready(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safegene_server.replica.reconciler.DRIFT_S", 0.05)
    world.publish("acme", 0.5)

    async def change() -> None:
        assert world.replica.problems() == ()
        world.engine.report_errors = ("rank 1 holds gain row x, expected y",)
        await until(lambda: world.replica.problems() == world.engine.report_errors)
        errors = world.engine.report_errors
        await until(lambda: [r.faults for r in world.registry.replicas.list()] == [errors])
        world.engine.report_errors = ()
        await until(lambda: world.replica.problems() == ())

    run(world, change)


def test_a_replica_that_was_forgotten_joins_again(world: World) -> None:
    world.publish("acme", 0.5)

    async def change() -> None:
        before = world.replica.id
        world.registry.replicas.leave(before, actor="t")
        await world.replica.reconcile()
        (seen,) = world.registry.replicas.list()
        assert seen.id == world.replica.id != before
        assert [r.replica for r in world.registry.replicas.receipts(revision=1)] == [seen.id]

    run(world, change)


def test_the_base_model_is_a_grant_and_never_a_default(world: World) -> None:
    tenants = ["base", "acme"]
    new_key = world.registry.keys.add("k", scopes=["serve"], tenants=tenants, actor="t")
    principal = principal_of_key(new_key.key)
    assert principal.base and principal.tenants == {"acme"} and principal.default_tenant is None
    for reach in (tenants, ["*"]):
        with pytest.raises(RegistryError, match="reserved for the base model"):
            world.registry.keys.add(
                "b", scopes=["serve"], tenants=reach, default_tenant="base", actor="t"
            )
