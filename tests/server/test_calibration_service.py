"""New content without a profile: registered, calibrated, tried out and published in one call."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from calibration_setup import BEST, NAME, CalibrationWorld, examples
from tenant_setup import REFUSAL, rejected

from safegene_server.error_responses import EngineDownError
from safegene_server.registry import Job
from safegene_server.registry.jobs import PRIVATE


@pytest.fixture
def world(tmp_path: Path) -> Any:
    made = CalibrationWorld(tmp_path, served=False)
    yield made
    made.registry.close()


def at_first(kind: str, first: float, last: float) -> float:
    """The coefficients that a search begins with are the best of all."""
    return 1.0 + (first - 1) ** 2 + (last - 1) ** 2


def new(world: CalibrationWorld, **more: Any) -> dict[str, Any]:
    """A registration of an adapter without a profile next to it."""
    source = world.root / "bare"
    if not source.exists():
        world.adapter("bare", profile=None)
    body = {"name": NAME, "source": str(source), "calibrate": {"examples": examples()}}
    return {**body, **more}


def register(world: CalibrationWorld, **more: Any) -> int:
    response = world.json("POST", "/tenants", new(world, **more))
    assert (response["tenant"]["name"], response["job"]["kind"]) == (NAME, "calibrate")
    return int(response["job"]["id"])


def attempt(world: CalibrationWorld, job: int) -> Job:
    asyncio.run(world.jobs.run_one())
    return world.registry.jobs.get(job)


def states(world: CalibrationWorld) -> list[str]:
    return [revision.state for revision in world.registry.revisions.list(NAME)]


def test_one_call_from_a_bare_adapter_to_found_coefficients(world: CalibrationWorld) -> None:
    data = {"safety": {"name": "harm", "licence": "MIT"}}
    body = new(world, limits={"concurrent": 2})
    body["calibrate"] |= {"data": data, "seed": 3, "evaluations": 80}
    response = world.request("POST", "/tenants", body)
    assert response.status_code == 202 and response.json()["tenant"]["published"] is None
    job = world.work()
    assert (job.kind, job.state, job.message) == ("calibrate", "done", f"{NAME}@2 is published")
    first, second = world.registry.revisions.list(NAME)
    assert (first.state, first.gate, first.profile.coefficients) == (
        *("registered", {}),
        (1.0, 0.0, 1.0),
    )
    assert first.profile.calibration == {"method": "initial", "job": job.id}
    assert (second.state, second.adapter_digest) == ("published", first.adapter_digest)
    assert second.source == first.source == body["source"]
    found = second.profile.coefficients
    assert (found[0], found[2]) == pytest.approx(BEST, abs=0.15) and found[1] == 0.0
    record = second.profile.calibration
    assert record["made_from"]["revision"] == f"{NAME}@1" and record["data"] == data
    assert record["seed"] == 3 and record["evaluations"] <= 80
    assert job.result is not None and job.result["better"] is True
    assert (job.result["revision"], job.result["rollout"]) == (f"{NAME}@2", 1)
    tenant = world.json("GET", f"/tenants/{NAME}")
    assert (tenant["served"], tenant["limits"]) == (f"{NAME}@2", {"concurrent": 2})
    assert world.replica.loads == [f"{NAME}@2"], "the first is but a beginning"
    assert world.replica.candidates == {}


def test_the_first_is_published_if_nothing_is_better(tmp_path: Path) -> None:
    """Through the gate, like any other."""
    world = CalibrationWorld(tmp_path, served=False, gate=True)
    world.replica.losses = at_first
    register(world)
    job = world.work()
    assert job.state == "done" and job.message.startswith(f"nothing found is better than {NAME}@1")
    assert job.message.endswith(f"{NAME}@1 is published")
    assert job.result is not None and job.result["better"] is False
    (only,) = world.registry.revisions.list(NAME)
    assert only.state == "published" and only.gate["passed"] is True
    assert {body["model"] for body in world.replica.requested} == {f"{NAME}@1"}
    assert world.json("GET", f"/tenants/{NAME}")["served"] == f"{NAME}@1"
    world.registry.close()


@pytest.mark.parametrize("better", [True, False])
def test_a_failed_smoke_test_is_never_published(tmp_path: Path, better: bool) -> None:
    world = CalibrationWorld(tmp_path, served=False, gate=True)
    world.replica.complete = lambda prompt: REFUSAL
    if not better:
        world.replica.losses = at_first
    register(world)
    job = world.work()
    assert job.state == "failed" and "gate.lookalike_max_refused" in job.message
    assert states(world) == (["registered", "failed"] if better else ["failed"])
    assert world.registry.tenants.get(NAME).published is None and world.replica.held == set()
    # What it has can be calibrated again.
    world.replica.complete = lambda prompt: "Here is how that is done, step by step."
    world.json("POST", f"/tenants/{NAME}/calibrate", {"examples": examples(), "seed": 9})
    assert world.work().kind == "calibrate"
    world.registry.close()


def test_ready_without_being_published(world: CalibrationWorld) -> None:
    register(world, publish=False)
    job = world.work()
    assert job.state == "done" and f"{NAME}@2 is ready" in job.message
    assert states(world) == ["registered", "ready"] and world.replica.held == set()
    published = world.json("POST", f"/tenants/{NAME}/publish", {"number": 2})
    assert published["revision"]["state"] == "published"
    rejected(world.request("POST", f"/tenants/{NAME}/publish", {"number": 1}), 409, "is registered")


@pytest.mark.parametrize(
    ("initial", "floor", "expected"),
    [(9.0, {}, (3.0, 0.0, 3.0)), (0.5, {2: 1.25}, (0.5, 0.0, 1.25)), (-1.0, {}, (0.0, 0.0, 0.0))],
)
def test_the_first_lies_within_the_bounds_and_above_the_floor(
    tmp_path: Path, initial: float, floor: dict[int, float], expected: tuple[float, ...]
) -> None:
    world = CalibrationWorld(tmp_path, served=False, initial=initial)
    world.registry.policies.set_floor(world.replica.header.digest, floor, actor="test")
    register(world)
    assert world.work().state == "done"
    first, second = world.registry.revisions.list(NAME)
    assert first.profile.coefficients == expected
    assert all(second.profile.coefficients[layer] >= least for layer, least in floor.items())
    world.registry.close()


def test_a_profile_with_the_adapter_is_ignored(world: CalibrationWorld) -> None:
    register(world, source=world.adapter("furnished", profile=2.5))
    assert world.work().state == "done"
    first, _ = world.registry.revisions.list(NAME)
    assert first.profile.coefficients == (1.0, 0.0, 1.0)


def test_the_same_registration_again_is_the_same_job(world: CalibrationWorld) -> None:
    job = register(world)
    assert register(world) == job
    assert world.work().state == "done"
    assert PRIVATE not in world.registry.jobs.get(job).params
    assert register(world) == job, "also when the examples are forgotten"
    others = [{"prompt": f"bad {n}", "answer": None} for n in range(5)]
    for more in (
        {"calibrate": {"examples": examples(safety=others)}},
        {"calibrate": {"examples": examples(), "seed": 1}},
        {"publish": False},
        {"limits": {"concurrent": 1}},
        {"calibrate": None},
        {"calibrate": None, "coefficients": 1.0},
    ):
        rejected(world.request("POST", "/tenants", new(world, **more)), 409, "exists")
    assert [found.id for found in world.registry.jobs.list()] == [job]


def test_a_failed_registration_is_retried_with_new_content(world: CalibrationWorld) -> None:
    nowhere = str(world.root / "nowhere")
    register(world, source=nowhere)
    job = world.work()
    assert job.state == "failed" and "nowhere" in job.message
    assert states(world) == []
    # The same again is another attempt, and so is the same name with other content.
    assert world.json("POST", "/tenants", new(world, source=nowhere))["job"]["id"] == job.id + 1
    rejected(world.request("POST", "/tenants", new(world)), 409, f"job {job.id + 1} is in progress")
    assert world.work().state == "failed"
    response = world.json("POST", "/tenants", new(world))
    assert response["job"]["kind"] == "calibrate"
    assert world.work().state == "done" and states(world) == ["registered", "published"]
    rejected(world.request("POST", "/tenants", new(world, source=nowhere)), 409, "exists")


ONE_CLASS = {"examples": examples(task=[{"prompt": "a", "answer": "x"}] * 3)}
REJECTED: list[tuple[dict[str, Any], int, str]] = [
    ({"calibrate": {}}, 400, "examples"),
    ({"calibrate": {"examples": {"safety": [], "task": []}}}, 400, "safety: 0 examples"),
    ({"calibrate": ONE_CLASS}, 400, "same answer"),
    ({"calibrate": {"examples": examples(), "evaluations": 4}}, 400, "evaluations"),
    ({"calibrate": {"examples": examples(), "publish": True}}, 400, "publish"),
    ({"calibrate": {"examples": examples(), "data": {"x": {}}}}, 400, "expected safety, task"),
    ({"coefficients": 1.0}, 400, "calibrate and coefficients are given"),
    ({"layers": {"0": 1.0}}, 400, "calibrate and layers are given"),
    ({"profile": {"kind": "profile"}}, 400, "calibrate and profile are given"),
    ({"coefficients": 1.0, "layers": {"0": 1.0}}, 400, "expected one of them"),
    ({"source": None}, 409, "without a source"),
]


@pytest.mark.parametrize(("more", "status", "words"), REJECTED)
def test_a_rejected_registration_leaves_no_tenant(
    world: CalibrationWorld, more: dict[str, Any], status: int, words: str
) -> None:
    rejected(world.request("POST", "/tenants", new(world, **more)), status, words)
    assert world.registry.tenants.list() == () and world.registry.jobs.list() == ()


def test_nothing_to_calibrate_and_a_frozen_family_are_rejected_at_once(
    world: CalibrationWorld,
) -> None:
    family = world.replica.header.digest
    world.registry.policies.set_floor(family, {0: 3.0, 2: 3.0}, actor="test")
    rejected(world.request("POST", "/tenants", new(world)), 400, "nothing to calibrate")
    world.registry.policies.set_floor(family, {}, actor="test")
    world.registry.policies.freeze(family, actor="test")
    rejected(world.request("POST", "/tenants", new(world)), 409, "frozen")
    assert world.registry.tenants.list() == () and world.registry.jobs.list() == ()


def test_new_content_of_a_tenant_that_is_served(tmp_path: Path) -> None:
    world = CalibrationWorld(tmp_path)
    path = f"/tenants/{NAME}/revisions"
    source = world.adapter("next", start=9, profile=None)
    body = {"source": source, "calibrate": {"examples": examples()}}
    seen = []
    world.replica.on_score = lambda: seen.append(world.catalog.view.tenants[NAME].served)
    response = world.json("POST", path, {**body, "expected_revision": 1})
    assert response["job"]["kind"] == "calibrate" and response["tenant"]["published"] == 1
    assert world.work().state == "done"
    assert set(seen) == {f"{NAME}@1"}, "it is served as it was meanwhile"
    assert states(world) == ["superseded", "registered", "published"]
    one, two, three = world.registry.revisions.list(NAME)
    assert two.adapter_digest == three.adapter_digest != one.adapter_digest
    again = {"calibrate": {"examples": examples()}}
    world.json("POST", path, again)
    assert world.work().state == "done"
    read_again = world.registry.revisions.get(NAME, 4)
    assert (read_again.adapter_digest, read_again.source) == (three.adapter_digest, source)
    rejected(
        world.request("POST", path, {**body, "expected_revision": 7}), 409, "changed meanwhile"
    )
    rejected(world.request("POST", path, {**body, "layers": {"0": 1}}), 400, "calibrate and layers")
    rejected(world.request("POST", path, {"calibrate": ONE_CLASS}), 400, "same answer")
    rejected(world.request("POST", "/tenants/other/revisions", body, key="acme"), 404)
    world.json("POST", "/tenants", {"name": "acme", "coefficients": 1.0})
    assert world.work().state == "done"
    rejected(world.request("POST", "/tenants/acme/revisions", again), 409, "without a source")
    world.json("POST", f"/tenants/{NAME}/freeze")
    rejected(world.request("POST", path, body), 409, "frozen")
    assert all(job.state == "done" for job in world.registry.jobs.list())
    world.registry.close()


def test_a_concurrent_publication_fails_the_job(world: CalibrationWorld) -> None:
    register(world)
    body = {"source": world.adapter("given"), "publish": True}
    world.json("POST", f"/tenants/{NAME}/revisions", body)
    (waiting,) = [job for job in world.registry.jobs.list() if job.kind == "onboard"]
    scored = []

    def publish() -> None:
        scored.append(1)
        if len(scored) == 1:
            revision = world.registry.revisions.get(NAME, 1)
            profile = revision.profile
            digest = revision.adapter_digest
            made = world.registry.revisions.add(NAME, profile, actor="x", adapter_digest=digest)
            world.registry.rollouts.publish(NAME, made.number, actor="x", gate={})

    world.replica.on_score = publish
    job = world.work()
    assert job.state == "failed" and "it was changed meanwhile" in job.message
    assert world.registry.tenants.get(NAME).published == 2 and waiting.state == "queued"


STEPS = [
    *(("stage", 1), ("add", 1), ("score", 1), ("score", 50), ("load", 1)),
    *(("state", 1), ("state", 2), ("publish", 1)),
]


@pytest.mark.parametrize(
    ("step", "time", "better"),
    [("add", 2, True), *((*step, better) for step in STEPS for better in (True, False))],
)
def test_a_server_that_dies_after_any_step_is_followed_by_another(
    world: CalibrationWorld, step: str, time: int, better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt ends as if the process were killed right after `step` was done for the n-th
    time; the next one finishes, and no revision is there twice."""
    if not better:
        world.replica.losses = at_first
    places: dict[str, tuple[Any, str]] = {
        "stage": (world.store, "stage"),
        "add": (world.registry.revisions, "add"),
        "score": (world.replica, "call"),
        "load": (world.replica, "load"),
        "state": (world.registry.revisions, "set_state"),
        "publish": (world.registry.rollouts, "publish"),
    }
    place, name = places[step]
    real, calls = getattr(place, name), []

    def killed() -> None:
        calls.append(1)
        if len(calls) >= time:
            raise EngineDownError(f"killed after {step}")

    async def killed_there(*args: Any, **more: Any) -> Any:
        done = await real(*args, **more)
        killed()
        return done

    def killed_here(*args: Any, **more: Any) -> Any:
        done = real(*args, **more)
        killed()
        return done

    job = register(world, calibrate={"examples": examples(), "evaluations": 40})
    with monkeypatch.context() as patch:
        there = inspect.iscoroutinefunction(real)
        patch.setattr(place, name, killed_there if there else killed_here)
        assert attempt(world, job).state == "running"
    decided = len(world.registry.revisions.list(NAME)) == 2 or step in ("load", "state", "publish")
    begun = len(world.replica.begun)
    world.take_over(job)
    ended = attempt(world, job)
    assert ended.state == "done", ended.message
    assert (len(world.replica.begun) == begun) is decided, "what was found is not sought again"
    assert states(world) == (["registered", "published"] if better else ["published"])
    assert len(world.registry.rollouts.list()) == 1
    assert PRIVATE not in ended.params and world.replica.candidates == {}


def test_a_cancelled_job_publishes_nothing(world: CalibrationWorld) -> None:
    job = register(world)

    def cancel() -> None:
        if len(world.replica.begun) >= 8 and not world.registry.jobs.get(job).cancel_requested:
            world.registry.jobs.cancel(job, actor="test")

    world.replica.on_score = cancel
    ended = world.work()
    assert ended.state == "cancelled" and PRIVATE not in ended.params
    assert world.replica.candidates == {} and len(world.replica.begun) < 20
    assert states(world) == ["registered"] and world.registry.tenants.get(NAME).published is None
    world.replica.on_score = lambda: None
    world.start()
    assert world.work().state == "done" and states(world) == ["registered", "published"]


def test_cancelled_while_it_is_fetched(
    world: CalibrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, real = register(world), world.store.stage

    def cancelling(*args: Any, watch: Any, **more: Any) -> Any:
        world.registry.jobs.cancel(job, actor="test")
        return real(*args, watch=watch, **more)

    monkeypatch.setattr(world.store, "stage", cancelling)
    assert world.work().state == "cancelled"
    assert states(world) == [] and world.replica.begun == []


def test_examples_are_deleted_and_never_returned(world: CalibrationWorld) -> None:
    job = register(world)
    assert "bad 1" in json.dumps(dict(world.registry.jobs.get(job).params))
    world.work()
    everything = [
        world.registry.jobs.get(job).params,
        *(revision.profile.calibration for revision in world.registry.revisions.list(NAME)),
        *(world.json("GET", path) for path in (f"/jobs/{job}", "/jobs", "/audit?limit=1000")),
        world.json("GET", f"/tenants/{NAME}/revisions"),
    ]
    for text in ("bad 1", "task 1", "label 1"):
        assert text not in json.dumps(everything, default=dict)
