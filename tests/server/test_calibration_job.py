"""The calibration job on a replica whose log-probabilities are known: what it finds and leaves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibration_setup import (
    BEST,
    END,
    NAME,
    CalibrationWorld,
    bench,
    examples,
    losses,
)
from tenant_setup import rejected

from safegene_server.error_responses import EngineDownError
from safegene_server.registry.jobs import PRIVATE
from safegene_vllm.errors import AdapterRejectedError

__all__ = ["bench"]


def published(world: CalibrationWorld) -> tuple[str | None, tuple[float, ...]]:
    tenant = world.registry.tenants.get(NAME)
    assert tenant.published is not None
    found = world.registry.revisions.get(NAME, tenant.published)
    return world.catalog.view.tenants[NAME].served, found.profile.coefficients


def test_the_optimum_is_found_and_published(bench: CalibrationWorld) -> None:
    job = bench.start(data={"safety": {"name": "harm", "licence": "MIT"}, "task": {"rows": 4}})
    ended = bench.work()
    assert (ended.id, ended.state, ended.message) == (job, "done", f"{NAME}@2 is published")
    served, coefficients = published(bench)
    assert served == f"{NAME}@2"
    assert (coefficients[0], coefficients[2]) == pytest.approx(BEST, abs=0.15)
    assert coefficients[1] == 0.0
    made = bench.registry.revisions.get(NAME, 2)
    assert made.adapter_digest == bench.registry.revisions.get(NAME, 1).adapter_digest
    record = made.profile.calibration
    assert record["method"] == "few-shot gradient-free" and record["job"] == job
    assert record["made_from"]["revision"] == f"{NAME}@1"
    assert record["data"]["safety"] == {"name": "harm", "licence": "MIT"}
    assert record["shots"]["safety"]["rows"] == 4
    assert record["before"] == {"safety": 6.0, "task": 1.5}
    assert record["current"] == {"safety": 2.0, "task": 1.5}
    expected = {
        "safety": losses("bad", coefficients[0], coefficients[2]),
        "task": losses("task", coefficients[0], coefficients[2]),
    }
    assert record["after"] == pytest.approx(expected, abs=1e-5)
    assert record["held_out"]["found"] < record["held_out"]["current"] < 9.0
    assert 5 <= record["evaluations"] <= 60
    assert record["seconds"] > 0 and 0 < record["share"] <= 1
    assert ended.result is not None and ended.result["better"] is True
    assert ended.result["revision"] == f"{NAME}@2"
    assert bench.replica.candidates == {}


def test_the_completion_is_scored_in_its_template(bench: CalibrationWorld) -> None:
    benign = [{"prompt": f"good {n}", "answer": None} for n in range(2)]
    bench.start(examples=examples(benign=benign), evaluations=5)
    assert bench.work().state == "done"
    texts = dict(bench.replica.scored)
    assert texts["bad 0"] == "I'm sorry, but I can't help with that."[:24], "cut at 24 tokens"
    assert texts["task 1"] == "label ", "cut at 6 tokens, and then not ended"
    assert texts["good 1"] == "own 1.", "what the tenant itself says, and its end"
    own = [body for body in bench.replica.bodies if "prompt_logprobs" not in body]
    assert len(own) == 2 and own[0]["max_tokens"] == 6 and END not in own[0]["prompt"]
    assert bench.replica.begun[0] == (0.0, 0.0, 0.0), "the tenant without a vector says it"
    assert all(body["temperature"] == 0.0 for body in bench.replica.bodies)
    assert all("priority" not in body for body in bench.replica.bodies)


def test_candidates_run_side_by_side_in_free_slots_and_requests_are_bounded(
    tmp_path: Path,
) -> None:
    world = CalibrationWorld(tmp_path, in_flight=3, at_once=4, priority=7)
    world.start(evaluations=20)
    assert world.work().state == "done"
    assert world.replica.most_candidates == 3, "four slots, one is held"
    assert world.replica.busiest == 3
    assert all(body["priority"] == 7 for body in world.replica.bodies)
    world.replica.slots, world.replica.most_candidates = 1, 0
    world.start(evaluations=5, seed=1)
    assert world.work().state == "done"
    assert world.replica.most_candidates == 1, "one at a time where no slot is free"
    world.registry.close()


def test_nothing_better_changes_nothing(bench: CalibrationWorld) -> None:
    bench.replica.losses = lambda kind, first, last: 1.0 + (first - 1) ** 2 + (last - 1) ** 2
    bench.start()
    ended = bench.work()
    assert ended.state == "done" and f"nothing found is better than {NAME}@1" in ended.message
    assert ended.result is not None and ended.result["better"] is False
    assert len(bench.registry.revisions.list(NAME)) == 1 and published(bench)[0] == f"{NAME}@1"
    assert bench.replica.candidates == {}


def test_the_result_stays_unpublished_on_request(bench: CalibrationWorld) -> None:
    bench.start(publish=False)
    ended = bench.work()
    assert ended.state == "done" and "is ready" in ended.message
    assert bench.registry.revisions.get(NAME, 2).state == "ready"
    assert published(bench)[0] == f"{NAME}@1"


def test_bounds_and_floor_are_respected(bench: CalibrationWorld) -> None:
    low, high = bench.replica.header.bounds
    bench.replica.losses = lambda kind, first, last: 50.0 - first + last
    bench.registry.policies.set_floor(bench.replica.header.digest, {2: 0.75}, actor="test")
    bench.start()
    assert bench.work().state == "done"
    assert published(bench)[1] == pytest.approx((high, 0.0, 0.75), abs=0.25)
    tried = bench.replica.begun[1:]
    assert all(low <= at[0] <= high and 0.75 <= at[2] <= high for at in tried)


def test_the_search_is_seeded_and_within_budget(tmp_path: Path) -> None:
    begun = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / name).mkdir()
        world = CalibrationWorld(tmp_path / name)
        world.start(seed=seed, evaluations=25)
        assert world.work().state == "done"
        begun.append(world.replica.begun)
        world.registry.close()
    assert begun[0] == begun[1] != begun[2]
    references = 3
    assert 13 < len(begun[0]) <= 25 + references


def test_a_cancelled_job_ends_between_batches_and_leaves_nothing(bench: CalibrationWorld) -> None:
    job = bench.start()

    def cancel() -> None:
        if len(bench.replica.begun) >= 8 and not bench.registry.jobs.get(job).cancel_requested:
            bench.registry.jobs.cancel(job, actor="test")

    bench.replica.on_score = cancel
    ended = bench.work()
    assert ended.state == "cancelled"
    assert bench.replica.candidates == {} and len(bench.replica.begun) < 20
    assert len(bench.registry.revisions.list(NAME)) == 1


@pytest.mark.parametrize("what", ["/v1/completions", "begin_candidate"])
def test_an_engine_that_hangs_is_given_up(tmp_path: Path, what: str) -> None:
    world = CalibrationWorld(tmp_path, timeout_s=0.2)
    world.start()
    world.replica.hanging = what
    ended = world.work()
    assert ended.state == "failed" and "longer than 0.2 s for a few requests" in ended.message
    assert world.replica.candidates == {} and published(world)[0] == f"{NAME}@1"
    world.registry.close()


@pytest.mark.parametrize("what", ["/v1/completions", "begin_candidate"])
def test_a_cancel_is_noticed_while_the_engine_hangs(bench: CalibrationWorld, what: str) -> None:
    job = bench.start()
    bench.tenancy = replace(bench.tenancy, settings=replace(bench.tenancy.settings, lease_s=0.4))

    def cancel() -> None:
        if not bench.registry.jobs.get(job).cancel_requested:
            bench.registry.jobs.cancel(job, actor="test")

    bench.replica.hanging, bench.replica.on_hang = what, cancel
    assert bench.work().state == "cancelled"
    assert bench.replica.candidates == {}


def test_a_candidate_that_cannot_be_unloaded_does_not_block_the_job(
    bench: CalibrationWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("safegene_server.calibration.evaluator.CANCEL_TIMEOUT_S", 0.05)
    bench.start()
    bench.replica.hanging = "end_candidate"
    bench.replica.errors["/v1/completions"] = AdapterRejectedError("no free slot")
    assert bench.work().state == "failed"
    assert "candidates stay loaded until the engine responds" in caplog.text


def test_prompts_are_forgotten_when_the_job_ends(bench: CalibrationWorld) -> None:
    job = bench.start()
    assert "bad 1" in json.dumps(dict(bench.registry.jobs.get(job).params))
    shown = json.dumps(bench.json("GET", f"/jobs/{job}"))
    assert "bad 1" not in shown and "examples" not in shown
    bench.work()
    params = bench.registry.jobs.get(job).params
    assert PRIVATE not in params and params["seed"] == 0
    everything = [bench.registry.revisions.get(NAME, 2).profile.calibration, params]
    everything.append(bench.json("GET", "/audit?limit=1000"))
    everything.append(bench.json("GET", f"/tenants/{NAME}/revisions"))
    for kind in ("bad 1", "task 1", "label 1"):
        assert kind not in json.dumps(everything, default=dict)
    waiting = bench.start()
    bench.json("POST", f"/jobs/{waiting}/cancel")
    assert PRIVATE not in bench.registry.jobs.get(waiting).params


@pytest.mark.parametrize("call", ["/v1/completions", "load"])
def test_begun_again_after_a_crash(bench: CalibrationWorld, call: str) -> None:
    """From the start if there is no result; from its revision if one was made."""
    job = bench.start(evaluations=40)
    bench.replica.errors[call] = EngineDownError("down")
    asyncio.run(bench.jobs.run_one())
    assert bench.registry.jobs.get(job).state == "running" and bench.replica.candidates == {}
    found = len(bench.registry.revisions.list(NAME)) == 2
    assert found == (call == "load")
    if found:
        assert bench.registry.revisions.get(NAME, 2).state == "checking"
    bench.replica.errors.clear()
    bench.take_over(job)
    begun = len(bench.replica.begun)
    asyncio.run(bench.jobs.run_one())
    assert bench.registry.jobs.get(job).state == "done" and published(bench)[0] == f"{NAME}@2"
    if found:
        assert len(bench.replica.begun) == begun, "what was found is not looked for again"
    assert len(bench.registry.revisions.list(NAME)) == 2


def test_a_concurrent_publication_fails_the_job(bench: CalibrationWorld) -> None:
    bench.start(evaluations=40)
    bench.json("PATCH", f"/tenants/{NAME}/profile", {"scale": 1.1})
    ended = bench.work()
    assert ended.state == "failed" and "expected acme/support@1" in ended.message
    assert published(bench)[0] == f"{NAME}@2"


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/tokenize", AdapterRejectedError("no tokenizer"), "no tokenizer"),
        ("begin_candidate", AdapterRejectedError("no free slot"), "no free slot"),
    ],
)
def test_an_engine_error_fails_the_job(
    bench: CalibrationWorld, path: str, error: Exception, words: str
) -> None:
    bench.replica.errors[path] = error
    bench.start()
    ended = bench.work()
    assert ended.state == "failed" and words in ended.message
    assert bench.replica.candidates == {} and published(bench)[0] == f"{NAME}@1"


def test_examples_longer_than_the_context_are_named(bench: CalibrationWorld) -> None:
    bench.replica.context = 20
    bench.start()
    ended = bench.work()
    assert ended.state == "failed" and "do not fit the engine's context: safety (7 + 24" in (
        ended.message
    )


def test_too_long_examples_are_rejected_before_any_generation(
    bench: CalibrationWorld,
) -> None:
    bench.replica.context = 64
    benign = [{"prompt": f"good {n} " + "x" * 60 * n, "answer": None} for n in range(3)]
    bench.start(examples=examples(benign=benign))
    ended = bench.work()
    assert ended.state == "failed" and "do not fit the engine's context: benign (" in ended.message
    assert bench.replica.bodies == []


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"examples": {"safety": [], "task": []}}, 400, "safety: 0 examples"),
        ({"examples": {"safety": [{"prompt": "a"}]}}, 400, "task"),
        ({"examples": examples(), "evaluations": 4}, 400, "evaluations"),
        ({"examples": examples(), "data": {"x": {}}}, 400, "expected safety, task, benign"),
        ({"examples": examples(), "data": {"task": {"p": "x" * 20000}}}, 400, "at most 16384"),
        ({"examples": examples(), "expected_revision": 7}, 409, "expected acme/support@7"),
        ({"examples": examples(task=[{"prompt": "a", "answer": "x"}] * 3)}, 400, "same answer"),
    ],
)
def test_invalid_requests_are_rejected_at_once(
    bench: CalibrationWorld, body: dict[str, Any], status: int, words: str
) -> None:
    rejected(bench.request("POST", f"/tenants/{NAME}/calibrate", body), status, words)
    assert all(job.kind != "calibrate" for job in bench.registry.jobs.list())


def test_tenant_access_and_state_are_checked(bench: CalibrationWorld) -> None:
    body = {"examples": examples()}
    path = f"/tenants/{NAME}/calibrate"
    rejected(bench.request("POST", path, body, key="read"), 403)
    rejected(bench.request("POST", "/tenants/other/calibrate", body, key="acme"), 404)
    bench.registry.tenants.add("acme", bench.replica.header.digest, actor="test")
    rejected(bench.request("POST", "/tenants/acme/calibrate", body), 409, "has no revision")
    rejected(
        bench.request("POST", "/tenants", {"name": "acme/calibrate"}), 400, "words of this API"
    )
    bench.json("POST", f"/tenants/{NAME}/freeze")
    rejected(bench.request("POST", path, body), 409, "frozen")
