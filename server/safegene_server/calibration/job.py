"""Job that calibrates a tenant on this engine and publishes the result.

It starts from an existing revision or stages new content. A job whose server died is restarted from
the beginning (candidates exist only in the engine); a revision that it had already added is reused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from safegene_server.calibration.evaluator import CandidateEvaluator
from safegene_server.calibration.examples import read_examples, record_of, split, weights_of
from safegene_server.calibration.search import (
    Evaluation,
    Losses,
    Objective,
    Space,
    Vector,
    search,
)
from safegene_server.registry import Revision
from safegene_server.registry.jobs import PRIVATE
from safegene_server.tenants import TenantContext, Work
from safegene_server.tenants.context import aside
from safegene_server.tenants.duty_cycle import DutyCycleLimiter
from safegene_server.tenants.jobs import JobCancelledError
from safegene_server.tenants.onboarding import check_and_publish, stage
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, make_profile

CALIBRATE = "calibrate"
METHOD = "few-shot gradient-free"
INITIAL = "initial"
"""The method of the coefficients that a search of new content begins with."""
SEARCH_ENDS = 0.35
"""Share of the job's progress; loading, the smoke test and publishing are the rest."""


async def calibrate(tenancy: TenantContext, work: Work) -> str:
    """Handler of CALIBRATE.

    `params`: revision (a number) or source, data, seed, evaluations, publish, expected, actor;
    private: examples.

    Errors: SafegeneError, EngineDownError; JobLostError.
    """
    params, name = work.job.params, work.job.tenant
    made = await _made_before(tenancy, work, METHOD)
    if made is not None:
        return await check_and_publish(tenancy, work, made)
    if "revision" in params:
        current = await aside(tenancy.registry.revisions.get, name, params["revision"])
    else:
        current = await _first(tenancy, work)
        if current.state != "registered":
            # An earlier attempt found nothing better and has started to onboard it.
            return await check_and_publish(tenancy, work, current)
    profile = await _better(tenancy, work, current)
    if profile is not None:
        made = await _add(tenancy, work, profile, current.adapter_digest, current.source)
        return await check_and_publish(tenancy, work, made)
    held = work.result["held_out"]
    message = (
        f"nothing found is better than {current.served_name}: held-out loss {held['found']:.4f} "
        f"against {held['current']:.4f}; "
    )
    if "revision" in params:
        return message + "nothing was changed"
    return message + await check_and_publish(tenancy, work, current)


def space_of(header: FamilyHeader, floor: Mapping[int, float]) -> Space:
    """The family's bounds, raised to its floor. Errors: ConfigError if nothing can move."""
    low, high = header.bounds
    lower = tuple(max(low, floor.get(entry.layer, low)) for entry in header.layers)
    return Space(lower, (high,) * len(lower))


async def _made_before(tenancy: TenantContext, work: Work, method: str) -> Revision | None:
    """The revision with such coefficients that an earlier attempt of this job has added."""
    for known in reversed(await aside(tenancy.registry.revisions.list, work.job.tenant)):
        calibration = known.profile.calibration
        same = (calibration.get("method"), calibration.get("job")) == (method, work.job.id)
        # Ids of jobs come again in a registry that was restored, and owners write what they like.
        mine = known.created_by == work.job.params["actor"]
        if same and mine and known.created_at >= work.job.created_at:
            return known
    return None


async def _first(tenancy: TenantContext, work: Work) -> Revision:
    """The revision of new content that the search begins with: staged, and not tried out."""
    known = await _made_before(tenancy, work, INITIAL)
    if known is not None:
        return known
    source, header = work.job.params["source"], tenancy.replica.header
    staged = await stage(tenancy, work, source)
    await work.step(0.0, "checking")
    policy = await aside(tenancy.registry.policies.get, header.digest)
    at = space_of(header, policy.floor).scaled(tenancy.settings.calibration.initial)
    profile = _profile(header, at, {"method": INITIAL, "job": work.job.id})
    digest = None if staged is None else staged.digest
    return await _add(tenancy, work, profile, digest, source)


async def _add(
    tenancy: TenantContext,
    work: Work,
    profile: Profile,
    adapter_digest: str | None,
    source: str | None,
) -> Revision:
    params = work.job.params
    return await aside(
        tenancy.registry.revisions.add,
        work.job.tenant,
        profile,
        actor=params["actor"],
        adapter_digest=adapter_digest,
        source=source,
        expected=params["expected"],
    )


def _profile(header: FamilyHeader, at: Vector, record: Mapping[str, Any]) -> Profile:
    values = dict(zip((entry.layer for entry in header.layers), at, strict=True))
    return make_profile(header, values, record)


async def _better(tenancy: TenantContext, work: Work, current: Revision) -> Profile | None:
    """A profile with a lower held-out loss than the current one's; None if none was found."""
    settings, params = tenancy.settings.calibration, work.job.params
    await work.step(0.0, "reading the examples")
    examples = read_examples(params[PRIVATE]["examples"], settings)
    searched, held = split(examples, settings.held_out, params["seed"])
    header = tenancy.replica.header
    policy = await aside(tenancy.registry.policies.get, header.digest)
    space = space_of(header, policy.floor)
    share = DutyCycleLimiter(settings.share, tenancy.replica.in_flight, lambda: _check(work))
    weights = weights_of(settings, list(examples))
    objective = Objective(weights, settings.pull, settings.initial)
    evaluator = CandidateEvaluator(tenancy.replica, current, objective, settings, share)
    low, high = header.bounds
    await evaluator.prepare(searched, held, (min(max(0.0, low), high),) * len(header.layers))
    await work.step(0.03, "scoring the current coefficients")
    zero = await evaluator.evaluate_one(space.scaled(0.0))
    now = tuple(current.profile.coefficients[entry.layer] for entry in header.layers)
    served = zero if now == zero.at else await evaluator.evaluate_one(now)

    async def progress(tried: int, what: str) -> None:
        done = min(tried / params["evaluations"], 1.0)
        await work.step(0.05 + (SEARCH_ENDS - 0.05) * done, what)

    found = await search(
        space,
        evaluator.evaluate,
        [zero, served],
        budget=params["evaluations"],
        patience=settings.patience,
        seed=params["seed"],
        progress=progress,
    )
    better = _held(found.best) < _held(served) - settings.least_gain
    losses = {"zero": _held(zero), "current": _held(served), "found": _held(found.best)}
    outcome = {
        "better": better,
        "held_out": {name: round(loss, 6) for name, loss in losses.items()},
        "evaluations": found.tried,
        **share.record(),
    }
    work.result.update(outcome)
    if not better:
        return None
    record = {
        "method": METHOD,
        "job": work.job.id,
        "made_from": {"revision": current.served_name, "profile": current.profile.digest},
        "seed": params["seed"],
        "settings": asdict(settings),
        "shots": record_of(examples, held),
        "data": dict(params["data"]),
        "rounds": found.rounds,
        "before": _rounded(zero.parts),
        "current": _rounded(served.parts),
        "after": _rounded(found.best.parts),
        **outcome,
    }
    return _profile(header, found.best.at, record)


def _check(work: Work) -> None:
    """Errors: JobCancelledError."""
    if work.cancelled.is_set():
        raise JobCancelledError("the job was cancelled")


def _held(evaluation: Evaluation) -> float:
    return math.inf if evaluation.held is None else evaluation.held


def _rounded(parts: Losses | None) -> dict[str, float] | None:
    return None if parts is None else {kind: round(loss, 6) for kind, loss in parts.items()}
