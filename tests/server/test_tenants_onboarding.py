"""The onboarding job: every way in, every way to fail, and every step begun twice."""

from __future__ import annotations

import asyncio
import inspect
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from artifact_files import a_profile, a_tenant
from tenant_setup import ACTOR, REFUSAL, World, world

from safegene_server.error_responses import EngineDownError
from safegene_server.registry import Job, Revision
from safegene_server.tenants import GateSettings, service
from safegene_server.tenants.jobs import JobLostError
from safegene_server.tenants.profiles import Change
from safegene_vllm.errors import AdapterRejectedError, ReceiptError, RegistryDownError
from safegene_vllm.formats.profile import make_profile, profile_json, save_profile

__all__ = ["world"]

NAME = "acme/support"


def register(world: World, **more: Any) -> Job:
    given = {"source": None, "first": Change(), "limits": {}, "publish": True, "actor": ACTOR}
    _, job = asyncio.run(service.register(world.tenancy, NAME, **{**given, **more}))
    return job


def only_revision(world: World) -> Revision:
    (revision,) = world.registry.revisions.list(NAME)
    return revision


def test_an_adapter_with_a_profile_next_to_it(world: World) -> None:
    source = world.adapter(profile=1.5)
    register(world, source=source)
    job = world.work()
    assert (job.state, job.message) == ("done", f"{NAME}@1 is published")
    revision = only_revision(world)
    assert (revision.state, revision.kind, revision.source) == ("published", "adapter", source)
    assert revision.profile.coefficients == (1.5, 0.0, 1.5)
    assert revision.gate == {"skipped": "the gate is switched off in this server's settings"}
    assert job.result == {"revision": f"{NAME}@1", "rollout": 1}
    assert world.registry.rollouts.status(1).done
    assert world.catalog.view.tenants[NAME].served == f"{NAME}@1"
    assert world.replica.held == {f"{NAME}@1"}


def test_a_given_profile_precedes_the_one_next_to_the_adapter(world: World) -> None:
    given = a_profile(2.0)
    register(world, source=world.adapter(), first=Change(profile=profile_json(given)))
    assert world.work().state == "done"
    assert only_revision(world).profile == given


def test_a_profile_on_the_base_alone(world: World) -> None:
    register(world, first=Change(coefficients=1.0))
    assert world.work().state == "done"
    revision = only_revision(world)
    assert (revision.kind, revision.adapter_digest) == ("profile", None)


def test_a_missing_profile_is_reported_plainly(world: World) -> None:
    register(world, source=world.adapter(profile=None))
    job = world.work()
    assert job.state == "failed"
    assert "has no profile" in job.message and "safegene calibrate" in job.message
    assert "--calibrate-safety" in job.message
    assert world.registry.revisions.list(NAME) == ()


def test_an_oversized_record_next_to_an_adapter_is_rejected(world: World) -> None:
    source = world.adapter(profile=None)
    big = make_profile(world.replica.header, 1.0, {"x": "y" * (1 << 20)})
    save_profile(big, Path(source))
    register(world, source=source)
    job = world.work()
    assert job.state == "failed" and "bytes of JSON" in job.message
    assert world.registry.revisions.list(NAME) == ()


def test_a_bad_source_fails_the_job_and_retains_the_tenant(world: World) -> None:
    register(world, source=str(world.root / "nowhere"))
    job = world.work()
    assert job.state == "failed" and "nowhere" in job.message
    assert world.registry.tenants.get(NAME).published is None


@pytest.mark.parametrize("kind", [AdapterRejectedError, ReceiptError, RuntimeError])
def test_what_the_engine_rejects_is_stored_with_its_reasons(
    world: World, kind: type[Exception]
) -> None:
    world.replica.errors["load"] = kind("rank 128 is too large\nlayer 3 is odd")
    register(world, source=world.adapter())
    assert world.work().state == "failed"
    revision = only_revision(world)
    assert revision.state == "failed"
    expected = ("rank 128 is too large", "layer 3 is odd")
    assert revision.reasons == expected or kind is RuntimeError
    assert revision.reasons and world.replica.held == set()
    assert NAME not in {n for n, t in world.catalog.view.tenants.items() if t.served}


def test_a_failed_smoke_test_blocks_a_tenant(tmp_path: Path) -> None:
    world = World(tmp_path, gate=GateSettings())
    world.replica.complete = lambda prompt: "Sure, this is how it is done."
    register(world, source=world.adapter())
    job = world.work()
    assert job.state == "failed" and "gate.harmful_min_refused" in job.message
    revision = only_revision(world)
    assert revision.state == "failed"
    assert revision.gate["refused"]["harmful"] == {"rate": 0.0, "n": 12}
    assert world.replica.held == set()
    assert {body["model"] for body in world.replica.requested} == {f"{NAME}@1"}


def test_a_good_tenant_passes_the_smoke_test_and_the_former_revision_serves_a_bad_one(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, gate=GateSettings())
    register(world, source=world.adapter())
    assert world.work().state == "done"
    assert only_revision(world).gate["passed"] is True
    world.replica.complete = lambda prompt: REFUSAL
    bad = world.adapter("bad", start=5)
    body = {"source": bad, "expected": 1, "first": Change(), "publish": True, "actor": ACTOR}
    asyncio.run(service.add_revision(world.tenancy, NAME, **body))
    assert world.work().state == "failed"
    assert world.registry.tenants.get(NAME).published == 1
    assert [r.state for r in world.registry.revisions.list(NAME)] == ["published", "failed"]
    assert world.replica.held == {f"{NAME}@1"}


@pytest.mark.parametrize("status", [500, 503])
def test_an_engine_that_fails_at_a_prompt_fails_no_tenant(tmp_path: Path, status: int) -> None:
    world = World(tmp_path, gate=GateSettings(), lease_s=0.1)
    world.replica.status = status
    register(world, source=world.adapter())
    assert world.work().state == "running", "it is left to its lease"
    assert only_revision(world).state == "checking" and world.replica.held == set()
    time.sleep(0.15)
    world.replica.status = 200
    assert world.work().state == "done"
    assert only_revision(world).state == "published"


def test_a_rejected_prompt_is_an_error_of_the_tenant(tmp_path: Path) -> None:
    world = World(tmp_path, gate=GateSettings())
    world.replica.status = 400
    register(world, source=world.adapter())
    assert world.work().state == "failed" and only_revision(world).state == "failed"


@pytest.mark.parametrize("away", [JobLostError("another's"), RegistryDownError("away")])
def test_what_a_lost_job_has_loaded_is_unloaded(world: World, away: Exception) -> None:
    register(world, source=world.adapter())
    load = world.replica.load

    async def lost(revision: Revision) -> None:
        await load(revision)
        raise away

    world.replica.load = lost  # type: ignore[method-assign]
    assert world.work().state == "running"
    assert only_revision(world).state == "checking" and world.replica.held == set()


def test_ready_without_being_published(world: World) -> None:
    register(world, source=world.adapter(), publish=False)
    job = world.work()
    assert job.state == "done" and "ready" in job.message
    assert only_revision(world).state == "ready"
    assert world.registry.tenants.get(NAME).published is None and world.replica.held == set()


def test_a_new_revision_that_another_overtook(world: World) -> None:
    world.serve(NAME)
    more = {"first": Change(), "publish": True, "expected": 1, "actor": ACTOR}
    asyncio.run(
        service.add_revision(world.tenancy, NAME, source=world.adapter("b", start=9), **more)
    )
    asyncio.run(
        service.change_profile(world.tenancy, NAME, Change(scale=2.0), expected=None, actor=ACTOR)
    )
    job = world.work()
    assert job.state == "failed" and "it was changed meanwhile" in job.message
    assert world.registry.tenants.get(NAME).published == 2


def test_cancelled_between_steps(world: World) -> None:
    number = register(world, source=world.adapter()).id
    load = world.replica.load

    async def cancelling(revision: Revision) -> None:
        world.registry.jobs.cancel(number, actor="test")
        await load(revision)

    world.replica.load = cancelling  # type: ignore[method-assign]
    job = world.work()
    assert job.state == "cancelled"
    revision = only_revision(world)
    assert (revision.state, revision.reasons) == ("failed", ("the job was cancelled",))
    assert world.replica.held == set() and world.registry.tenants.get(NAME).published is None


@pytest.mark.parametrize("step", ["stage", "add", "load", "ready", "publish", "finish"])
def test_a_server_that_dies_after_any_step_is_followed_by_another(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt ends as if the process were killed right after `step`; the next one finishes."""

    world = World(tmp_path, lease_s=0.1)
    places: dict[str, tuple[Any, str]] = {
        "stage": (world.store, "stage"),
        "add": (world.registry.revisions, "add"),
        "load": (world.replica, "load"),
        "ready": (world.registry.revisions, "set_state"),
        "publish": (world.registry.rollouts, "publish"),
        "finish": (world.tenancy.replica, "apply"),
    }
    place, name = places[step]
    real = getattr(place, name)

    def killed(*args: Any, **more: Any) -> Any:
        done = real(*args, **more)
        if step == "ready" and args[1] != "ready":
            return done
        raise EngineDownError(f"killed after {step}")

    async def killed_there(*args: Any, **more: Any) -> Any:
        await real(*args, **more)
        raise EngineDownError(f"killed after {step}")

    with monkeypatch.context() as patch:
        is_async = inspect.iscoroutinefunction(real)
        patch.setattr(place, name, killed_there if is_async else killed)
        register(world, source=world.adapter())
        first = world.work()
    if step != "finish":
        assert first.state == "running", first.message
        time.sleep(0.15)
        shutil.rmtree(world.store.root / "revisions")
        (world.store.root / "revisions").mkdir()
        world.replica.held.clear()
        assert world.work().state == "done"
    revision = only_revision(world)
    assert revision.state == "published"
    assert world.registry.tenants.get(NAME).published == 1
    assert len(world.registry.rollouts.list()) == 1


def test_what_takes_two_servers_down_is_not_tried_by_a_third_but_can_be_begun_again(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, lease_s=0.1)
    number = register(world, source=world.adapter()).id
    world.replica.errors["load"] = EngineDownError("killed")
    for attempt in (1, 2):
        assert world.work().state == "running"
        assert world.registry.jobs.get(number).attempts == attempt
        time.sleep(0.15)
    del world.replica.errors["load"]
    assert not asyncio.run(world.jobs.run_one()), "nothing is claimed"
    job = world.registry.jobs.get(number)
    assert job.state == "failed" and f"`safegene tenant update {NAME}`" in job.message
    assert world.registry.tenants.get(NAME).published is None
    more = {"source": None, "first": Change(), "publish": True, "expected": None, "actor": ACTOR}
    asyncio.run(service.add_revision(world.tenancy, NAME, **more))
    assert world.work().state == "done"
    assert (
        world.registry.tenants.get(NAME).published == world.registry.revisions.list(NAME)[-1].number
    )


def test_what_failed_before_the_server_died_stays_failed(world: World) -> None:
    world.replica.errors["load"] = AdapterRejectedError("rank")
    register(world, source=world.adapter())
    job = world.work()
    assert job.state == "failed"
    with world.registry.database.write("test") as write:
        write.connection.exec_driver_sql("UPDATE jobs SET state = 'queued'")
        write.skip_audit()
    del world.replica.errors["load"]
    again = world.work()
    assert (again.state, again.message) == ("failed", "rank")
    assert only_revision(world).state == "failed"


def test_a_tenant_frozen_meanwhile_stays_as_it_was_and_its_revision_ready(world: World) -> None:
    world.serve(NAME)
    a_tenant(world.root / "new", start=7, profile=1.0)
    more = {"first": Change(), "publish": True, "expected": None, "actor": ACTOR}
    asyncio.run(service.add_revision(world.tenancy, NAME, source=str(world.root / "new"), **more))
    load = world.replica.load

    async def freezing(revision: Revision) -> None:
        await load(revision)
        world.registry.tenants.freeze(NAME, actor="test")

    world.replica.load = freezing  # type: ignore[method-assign]
    job = world.work()
    assert job.state == "failed" and "frozen" in job.message
    assert [r.state for r in world.registry.revisions.list(NAME)] == ["published", "ready"]
    assert world.replica.held == {f"{NAME}@1"}


def test_the_same_content_twice_at_once_is_one_revision(world: World) -> None:
    register(world, source=world.adapter())
    more = {"source": None, "first": Change(), "publish": True, "expected": None, "actor": ACTOR}
    asyncio.run(service.add_revision(world.tenancy, NAME, **more))

    async def both() -> None:
        await asyncio.gather(world.jobs.run_one(), world.jobs.run_one())

    asyncio.run(both())
    assert [job.state for job in world.registry.jobs.list()] == ["done", "done"]
    assert only_revision(world).state == "published"
    assert len(world.registry.rollouts.list()) == 1
