"""Tenant life after onboarding: changes, rollbacks, freezes, and who may be too late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from registry_setup import HEADER
from tenant_setup import ACTOR, REFUSAL, World, world

from safegene_server.error_responses import EngineDownError
from safegene_server.registry import Revision
from safegene_server.tenants import Change, GateSettings, service
from safegene_server.tenants.service import Published
from safegene_vllm.errors import (
    AdapterRejectedError,
    BoundsError,
    ConflictError,
    FrozenError,
    MissingFileError,
    NotFoundError,
    RegistryDownError,
    StoreError,
)
from safegene_vllm.formats.profile import Profile, make_profile

__all__ = ["world"]

NAME = "acme/support"
T = TypeVar("T")


def run(step: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(step)


def change(world: World, how: Change, *, expected: int | None = None) -> Published:
    return run(service.change_profile(world.tenancy, NAME, how, expected=expected, actor=ACTOR))


def set_floor(world: World, floor: dict[int, float]) -> Any:
    """Set the family's floor; return the rollout."""
    path = f"/families/{world.replica.header.digest}/floor"
    return world.json("PUT", path, {"floor": floor})["rollout"]


def back(world: World, number: int | None = None, *, expected: int | None = None) -> Published:
    return run(service.roll_back(world.tenancy, NAME, number, expected=expected, actor=ACTOR))


def test_a_change_is_a_new_revision_of_the_same_adapter(world: World) -> None:
    world.serve(NAME)
    staged = sorted((world.store.root / "adapters").iterdir())
    done = change(world, Change(scale=2.0), expected=1)
    first, second = world.registry.revisions.list(NAME)
    assert (done.revision, second.state, first.state) == (second, "published", "superseded")
    assert second.adapter_digest == first.adapter_digest and second.source == first.source
    assert second.profile.coefficients == (2.0, 0.0, 2.0)
    assert second.profile.calibration["made_from"]["revision"] == f"{NAME}@1"
    assert second.gate == {"made_from": f"{NAME}@1"}
    assert sorted((world.store.root / "adapters").iterdir()) == staged
    assert world.catalog.view.tenants[NAME].served == f"{NAME}@2"
    assert done.status is not None
    assert world.registry.rollouts.status(done.status.rollout.id).done
    assert world.registry.jobs.list()[0].kind == "onboard" and len(world.registry.jobs.list()) == 1


def test_the_same_change_again_changes_nothing(world: World) -> None:
    world.serve(NAME)
    once = change(world, Change(coefficients=2.0))
    again = change(world, Change(coefficients=2.0))
    assert again == once
    assert len(world.registry.revisions.list(NAME)) == 2


def test_a_change_of_an_unseen_revision_is_rejected(world: World) -> None:
    world.serve(NAME)
    with pytest.raises(ConflictError, match="it was changed meanwhile"):
        change(world, Change(scale=2.0), expected=7)
    assert len(world.registry.revisions.list(NAME)) == 1


def test_changes_at_once_in_one_server_follow_each_other(world: World) -> None:
    world.serve(NAME)

    async def both() -> None:
        steps = [
            service.change_profile(
                world.tenancy, NAME, Change(scale=1.1), expected=None, actor=ACTOR
            )
            for _ in range(5)
        ]
        await asyncio.gather(*steps)

    run(both())
    served = world.registry.revisions.get(NAME, 6)
    assert served.state == "published"
    assert served.profile.coefficients[0] == pytest.approx(1.1**5)


@pytest.mark.parametrize("error", [AdapterRejectedError("no slot"), RuntimeError("odd")])
def test_a_change_that_the_engine_rejects_leaves_the_old_served(
    world: World, error: Exception
) -> None:
    world.serve(NAME)
    world.replica.errors["load"] = error
    with pytest.raises(type(error)):
        change(world, Change(scale=2.0))
    assert world.registry.tenants.get(NAME).published == 1
    failed = world.registry.revisions.get(NAME, 2)
    assert failed.state == "failed" and failed.reasons
    assert world.replica.held == {f"{NAME}@1"}


@pytest.mark.parametrize("error", [StoreError("full"), RuntimeError("odd")])
def test_a_directory_that_cannot_be_made_yet_is_reported_by_the_load(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    world.serve(NAME)
    requested = []

    def reject(*args: object) -> None:
        requested.append(args)
        raise error

    monkeypatch.setattr(world.tenancy.store, "revision", reject)
    with pytest.raises(type(error)):
        change(world, Change(scale=1.5))
    failed = world.registry.revisions.get(NAME, 2)
    assert failed.state == "failed" and failed.reasons and len(requested) == 2
    assert world.registry.tenants.get(NAME).published == 1


def test_a_change_below_the_floor_or_out_of_bounds(world: World) -> None:
    world.serve(NAME)
    set_floor(world, {0: 0.5})
    with pytest.raises(BoundsError, match="floor"):
        change(world, Change(scale=0.1))
    with pytest.raises(BoundsError, match="expected"):
        change(world, Change(scale=100.0))
    assert world.registry.tenants.get(NAME).published == 1


def test_the_gate_on_a_change(tmp_path: Path) -> None:
    world = World(tmp_path, gate=GateSettings(), gate_on_change=True)
    world.serve(NAME)
    done = change(world, Change(scale=1.5))
    assert done.revision.gate["passed"] is True
    world.replica.complete = lambda prompt: REFUSAL
    with pytest.raises(AdapterRejectedError, match="lookalike_max_refused"):
        change(world, Change(scale=1.5))
    assert world.registry.tenants.get(NAME).published == 2
    assert world.registry.revisions.get(NAME, 3).gate["passed"] is False
    assert world.replica.held >= {f"{NAME}@2"} and f"{NAME}@3" not in world.replica.held


def test_a_change_that_is_too_late_leaves_nothing_loaded(world: World) -> None:
    world.serve(NAME)
    load = world.replica.load

    async def overtaken(revision: Any, path: Path) -> None:
        await load(revision, path)
        world.registry.tenants.freeze(NAME, actor="other")

    world.replica.load = overtaken  # type: ignore[method-assign]
    with pytest.raises(FrozenError):
        change(world, Change(scale=2.0))
    assert world.registry.revisions.get(NAME, 2).state == "ready"
    assert world.replica.held == {f"{NAME}@1"}


def test_a_change_is_reported_although_this_server_cannot_follow_it(world: World) -> None:
    world.serve(NAME)
    world.replica.errors["apply"] = RegistryDownError("away")
    done = change(world, Change(scale=2.0))
    assert world.registry.tenants.get(NAME).published == 2
    assert done.status is not None
    status = world.registry.rollouts.status(done.status.rollout.id)
    assert (status.applied, status.live) == (0, 1) and "needs" in status.lagging[0].reason


def test_nothing_to_change(world: World) -> None:
    with pytest.raises(NotFoundError):
        change(world, Change(scale=2.0))
    world.registry.tenants.add(NAME, world.replica.header.digest, actor=ACTOR)
    with pytest.raises(ConflictError, match="serves nothing"):
        change(world, Change(scale=2.0))


def test_back_and_further_back(world: World) -> None:
    world.serve(NAME)
    for _ in range(2):
        change(world, Change(scale=1.5))
    done = back(world, expected=3)
    assert done.revision.number == 2
    assert done.status is not None and done.status.rollout.kind == "rollback"
    with pytest.raises(ConflictError):
        back(world, expected=3)
    assert back(world).revision.number == 1
    assert world.catalog.view.tenants[NAME].served == f"{NAME}@1"
    with pytest.raises(ConflictError, match="nothing to roll back to"):
        back(world)


def test_back_to_a_number(world: World) -> None:
    world.serve(NAME)
    for _ in range(2):
        change(world, Change(scale=1.5))
    assert back(world, 1).revision.number == 1
    with pytest.raises((NotFoundError, ConflictError)):
        back(world, 9)


def test_back_to_what_cannot_be_loaded_changes_nothing(world: World) -> None:
    world.serve(NAME)
    change(world, Change(scale=1.5))
    world.replica.errors["load"] = MissingFileError("missing")
    with pytest.raises(MissingFileError):
        back(world)
    assert world.registry.tenants.get(NAME).published == 2


def test_publishing_by_hand(world: World) -> None:
    world.serve(NAME)
    change(world, Change(scale=1.5))
    loads = len(world.replica.loads)
    done = run(service.publish(world.tenancy, NAME, 1, expected=2, actor=ACTOR))
    assert done.revision.number == 1 and len(world.replica.loads) == loads + 1
    again = run(service.publish(world.tenancy, NAME, 1, expected=1, actor=ACTOR))
    assert again == done
    world.replica.errors["load"] = AdapterRejectedError("no")
    with pytest.raises(AdapterRejectedError):
        change(world, Change(scale=1.2))
    with pytest.raises(ConflictError, match="is failed"):
        run(service.publish(world.tenancy, NAME, 3, expected=None, actor=ACTOR))


@pytest.mark.parametrize("state", ["registered", "checking"])
def test_publishing_what_is_being_tried_out_leaves_it_to_its_job(world: World, state: str) -> None:
    world.serve(NAME)
    (first,) = world.registry.revisions.list(NAME)
    tried = world.registry.revisions.add(
        NAME,
        make_profile(world.replica.header, 2.0),
        actor=ACTOR,
        adapter_digest=first.adapter_digest,
    )
    if state != "registered":
        world.registry.revisions.set_state(tried.id, "checking", actor=ACTOR)
    run(world.replica.load(tried))
    with pytest.raises(ConflictError, match=f"is {state}"):
        run(service.publish(world.tenancy, NAME, 2, expected=None, actor=ACTOR))
    assert f"{NAME}@2" in world.replica.held


def loaded_by_rejected(world: World, step: Callable[[], Any]) -> set[str]:
    """Adapters left in the engine by a step that the registry rejects at the end."""
    held = set(world.replica.held)
    loads = len(world.replica.loads)
    with pytest.raises(BoundsError, match="floor"):
        step()
    assert len(world.replica.loads) == loads + 1
    return world.replica.held - held


def test_a_publication_or_rollback_that_is_rejected_leaves_nothing_loaded(world: World) -> None:
    world.serve(NAME)
    for _ in range(3):
        change(world, Change(scale=1.4))
    world.replica.held.discard(f"{NAME}@1")
    set_floor(world, {0: 1.2})
    publish = service.publish(world.tenancy, NAME, 1, expected=None, actor=ACTOR)
    assert loaded_by_rejected(world, lambda: run(publish)) == set()
    assert loaded_by_rejected(world, lambda: back(world, 1)) == set()


def test_a_rollback_to_a_loaded_revision_leaves_it_loaded(world: World) -> None:
    world.serve(NAME)
    change(world, Change(scale=2.5))
    set_floor(world, {0: 2.0})
    assert world.replica.held == {f"{NAME}@1", f"{NAME}@2"}
    with pytest.raises(BoundsError, match="floor"):
        back(world)
    assert world.replica.held == {f"{NAME}@1", f"{NAME}@2"}


@pytest.mark.parametrize("away", [EngineDownError("dead"), RegistryDownError("away")])
def test_a_change_that_an_outage_ended_is_not_marked_failed(
    tmp_path: Path, away: Exception
) -> None:
    world = World(tmp_path, gate=GateSettings(), gate_on_change=True)
    world.serve(NAME)
    world.replica.errors["call"] = away
    with pytest.raises(type(away)):
        change(world, Change(scale=2.0))
    revision = world.registry.revisions.get(NAME, 2)
    assert (revision.state, revision.reasons) == ("registered", ())
    assert world.replica.held == {f"{NAME}@1"}
    del world.replica.errors["call"]
    assert change(world, Change(scale=2.0)).revision.state == "published"


def test_the_source_of_the_served_revision_is_read_again(world: World) -> None:
    world.serve(NAME)
    again: dict[str, Any] = {"first": Change(), "expected": None, "actor": ACTOR}

    def update(source: str | None, *, publish: bool = True) -> str | None:
        step = service.add_revision(world.tenancy, NAME, source=source, publish=publish, **again)
        run(step)
        assert world.work().state == "done"
        return world.registry.revisions.list(NAME)[-1].source

    moved = world.adapter("moved", start=5)
    assert update(moved) == moved
    unpublished = world.adapter("unpublished", start=6)
    assert update(unpublished, publish=False) == unpublished
    assert update(None) == moved


def test_a_frozen_tenant_is_left_alone_by_every_change(world: World) -> None:
    world.serve(NAME)
    change(world, Change(scale=1.5))
    run(service.set_frozen(world.tenancy, NAME, True, actor=ACTOR))
    loads = list(world.replica.loads)
    more: dict[str, Any] = {"expected": None, "actor": ACTOR}
    for step in (
        lambda: change(world, Change(scale=1.1)),
        lambda: back(world),
        lambda: run(service.publish(world.tenancy, NAME, 1, **more)),
        lambda: run(service.retire(world.tenancy, NAME, **more)),
        lambda: run(
            service.add_revision(
                world.tenancy, NAME, source=None, first=Change(), publish=True, **more
            )
        ),
    ):
        with pytest.raises(FrozenError):
            step()
    assert world.replica.loads == loads
    run(service.set_frozen(world.tenancy, NAME, False, actor=ACTOR))
    assert back(world).revision.number == 1
    world.json("POST", f"/families/{world.replica.header.digest}/freeze")
    with pytest.raises(FrozenError):
        change(world, Change(scale=1.1))


def test_retiring_ends_the_jobs_and_may_be_repeated(world: World) -> None:
    world.serve(NAME)
    job = run(
        service.add_revision(
            world.tenancy,
            NAME,
            source=None,
            first=Change(),
            publish=True,
            expected=None,
            actor=ACTOR,
        )
    )
    tenant, rollout = run(service.retire(world.tenancy, NAME, expected=1, actor=ACTOR))
    assert tenant.state == "retired" and rollout is not None and rollout.kind == "retire"
    assert world.registry.jobs.get(job.id).state == "cancelled"
    assert NAME not in world.catalog.view.tenants and world.replica.held == set()
    assert run(service.retire(world.tenancy, NAME, expected=1, actor=ACTOR)) == (tenant, None)
    with pytest.raises(ConflictError, match="retired"):
        change(world, Change(scale=1.1))


def test_limits_are_live_at_once(world: World) -> None:
    world.serve(NAME)
    run(service.set_limits(world.tenancy, NAME, {"concurrent": 3}, actor=ACTOR))
    assert world.catalog.view.tenants[NAME].limits.concurrent == 3


def test_a_floor_raises_tenants_below_it(world: World) -> None:
    world.serve(NAME)
    rollout = set_floor(world, {0: 1.5})
    assert rollout is not None and world.registry.rollouts.status(rollout["id"]).done
    raised = world.registry.revisions.get(NAME, 2)
    assert raised.profile.coefficients == (1.5, 0.0, 1.0)
    assert raised.source == world.registry.revisions.get(NAME, 1).source
    assert world.catalog.view.tenants[NAME].served == f"{NAME}@2"
    assert set_floor(world, {0: 0.5}) is None


def test_the_same_registration_again_is_the_same_job(world: World) -> None:
    given: dict[str, Any] = {
        "source": world.adapter(),
        "first": Change(),
        "limits": {"concurrent": 2},
        "publish": True,
        "actor": ACTOR,
    }
    _, once = run(service.register(world.tenancy, NAME, **given))
    _, twice = run(service.register(world.tenancy, NAME, **given))
    assert twice.id == once.id
    assert world.work().state == "done"
    assert run(service.register(world.tenancy, NAME, **given))[1].id == once.id
    for other in ({"limits": {}}, {"source": "/else"}, {"publish": False}):
        with pytest.raises(ConflictError, match="exists"):
            run(service.register(world.tenancy, NAME, **{**given, **other}))


def test_a_registration_that_stopped_before_its_job_is_completed(world: World) -> None:
    source = world.adapter()
    digest = world.replica.header.digest
    world.registry.tenants.add(NAME, digest, actor=ACTOR, source=source)
    given = {"source": source, "first": Change(), "limits": {}, "publish": True}
    run(service.register(world.tenancy, NAME, **given, actor=ACTOR))  # type: ignore[arg-type]
    assert world.work().state == "done"


def test_nothing_is_registered_of_nothing(world: World) -> None:
    given = {"source": None, "first": Change(), "limits": {}, "publish": True}
    with pytest.raises(ConflictError, match="neither a source nor a profile"):
        run(service.register(world.tenancy, NAME, **given, actor=ACTOR))  # type: ignore[arg-type]
    assert world.registry.tenants.list() == ()


def test_a_tenant_of_another_family_is_for_another_server(world: World) -> None:
    world.registry.families.add(HEADER, None, actor=ACTOR)
    world.registry.tenants.add(NAME, HEADER.digest, actor=ACTOR)
    with pytest.raises(ConflictError, match="ask a server of that family"):
        change(world, Change(scale=1.1))


def test_a_change_writes_its_profile_once_and_does_not_read_it_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.serve(NAME)
    made: list[Path] = []
    loaded: list[Path | None] = []
    directory, load = world.store.revision, world.replica.load

    def revision(adapter_digest: str | None, profile: Profile) -> Path:
        made.append(directory(adapter_digest, profile))
        return made[-1]

    async def loading(revision: Revision, path: Path | None = None) -> None:
        loaded.append(path)
        await load(revision, path)

    def read(path: Path) -> Profile:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(world.store, "revision", revision)
    monkeypatch.setattr(world.replica, "load", loading)
    monkeypatch.setattr("safegene_server.artifacts.check.load_profile", read)
    world.json("PATCH", f"/tenants/{NAME}/profile", {"scale": 2})
    assert len(made) == 1 and loaded == made
