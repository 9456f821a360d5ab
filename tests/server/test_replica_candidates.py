"""Candidates in a replica without an engine: loaded temporarily, in no catalog, unloaded.

The world is that of the replica's own tests.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from test_replica_reconciler import World, run, world

from safegene_server.access.models import find
from safegene_server.replica.candidates import FIRST_ID
from safegene_server.replica.view import principal_of_key
from safegene_vllm.errors import BoundsError, ReceiptError
from safegene_vllm.formats.profile import load_profile

__all__ = ["world"]


def revisions_on_disk(world: World) -> set[str]:
    return {path.name for path in (world.root / "store" / "revisions").iterdir()}


def test_a_candidate_is_the_same_adapter_with_other_coefficients(world: World) -> None:
    served = world.publish("acme", 0.5)
    new_key = world.registry.keys.add("k", scopes=["serve"], tenants=["*"], actor="t")

    async def look() -> None:
        retained = revisions_on_disk(world)
        first = await world.replica.begin_candidate(served, [0.25, 2.0])
        second = await world.replica.begin_candidate(served, [0.25, 2.0])
        assert first != second, "the prefix cache knows adapters by their names"
        loaded = {request.name: request for request in world.engine.loaded.values()}
        assert {first, second} < set(loaded)
        assert loaded[first].path != loaded[second].path
        assert load_profile(loaded[first].path).coefficients == (0.25, 2.0)
        weights = "adapter_model.safetensors"
        own = world.engine.loaded[served.id].path / weights
        assert (loaded[first].path / weights).read_bytes() == own.read_bytes()
        ids = {number for number in world.engine.loaded if number != served.id}
        assert len(ids) == 2 and all(FIRST_ID <= number < 2**31 for number in ids)
        assert set(world.models.lora_requests) == {"acme@1", first, second}
        assert find(world.catalog.view, principal_of_key(new_key.key), first) is None
        assert [r.revision for r in world.registry.replicas.receipts()] == [served.id]
        await world.replica.reconcile()
        assert len(world.engine.loaded) == 3, "following the registry leaves candidates alone"
        for name in (first, second, second):
            await world.replica.end_candidate(name)
        assert list(world.engine.loaded) == [served.id]
        assert set(world.models.lora_requests) == {"acme@1"}
        assert f"forget {first}" in world.engine.log
        assert revisions_on_disk(world) == retained

    run(world, look)


def test_what_no_rank_accepts_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = world.publish("acme", 0.5)

    async def look() -> None:
        retained = revisions_on_disk(world)

        async def reject(request: Any, profile: Any) -> None:
            raise ReceiptError("rank 0 holds another row")

        with monkeypatch.context() as patch:
            patch.setattr(world.engine, "add", reject)
            with pytest.raises(ReceiptError):
                await world.replica.begin_candidate(served, [0.25, 2.0])
        with pytest.raises(BoundsError):
            await world.replica.begin_candidate(served, [99.0, 0.0])
        assert set(world.models.lora_requests) == {"acme@1"}
        assert revisions_on_disk(world) == retained and len(world.replica._candidates) == 0

    run(world, look)


def test_one_that_is_given_up_while_it_loads_is_taken_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = world.publish("acme", 0.5)

    async def look() -> None:
        loading, add = asyncio.Event(), world.engine.add

        async def slow(request: Any, profile: Any) -> None:
            await add(request, profile)
            loading.set()
            await asyncio.sleep(60)

        monkeypatch.setattr(world.engine, "add", slow)
        task = asyncio.create_task(world.replica.begin_candidate(served, [0.25, 2.0]))
        await asyncio.wait_for(loading.wait(), 300)
        assert len(world.engine.loaded) == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(world.engine.loaded) == [served.id] and len(world.replica._candidates) == 0

    run(world, look)


def test_slots_and_requests_are_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    served = world.publish("acme", 0.5)
    config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=3))
    monkeypatch.setattr(type(world.engine), "vllm_config", config, raising=False)

    async def look() -> None:
        assert world.replica.free_slots() == 2 and world.replica.in_flight() == 0
        names = [await world.replica.begin_candidate(served, [1.0, 1.0]) for _ in range(3)]
        assert world.replica.free_slots() == 0
        world.counters.running["acme@1"] += 2
        assert world.replica.in_flight() == 2
        for name in names:
            await world.replica.end_candidate(name)
        assert world.replica.free_slots() == 2

    run(world, look)
