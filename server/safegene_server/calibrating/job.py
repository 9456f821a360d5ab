"""The job that calibrates a tenant on this engine, and brings what it found into service.

A job whose server died is begun again from the start (candidates live in the engine only and go
with it), unless its revision is in the registry already: then it goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

from safegene_server.calibrating.bench import Bench
from safegene_server.calibrating.objective import Look, Losses, objective_of
from safegene_server.calibrating.search import Space, search
from safegene_server.calibrating.shots import read_shots, record_of, split, weights_of
from safegene_server.registry import Revision
from safegene_server.registry.jobs import PRIVATE
from safegene_server.tenants import Tenancy, Work
from safegene_server.tenants.jobs import JobCancelledError
from safegene_server.tenants.onboarding import bring_in
from safegene_server.tenants.share import Share
from safegene_server.tenants.tenancy import aside
from safegene_vllm.family import FamilyHeader
from safegene_vllm.profile import Profile, make_profile

CALIBRATE = "calibrate"
METHOD = "few-shot gradient-free"
SEARCH_ENDS = 0.35
"""Of the job's progress; loading, the gate and publishing are the rest."""


async def calibrate(tenancy: Tenancy, work: Work) -> str:
    """The handler of CALIBRATE. `params`: revision, data, seed, evaluations, publish, expected,
    actor; private: examples.

    Errors: SafegeneError, EngineDownError; JobLostError.
    """
    registry, params = tenancy.registry, work.job.params
    name, actor = work.job.tenant, params["actor"]
    made = await _made_before(tenancy, work)
    if made is None:
        current = await aside(registry.revision, name, params["revision"])
        profile = await _better(tenancy, work, current)
        if profile is None:
            held = work.result["held_out"]
            return (
                f"nothing found is better than {current.served_name}: held-out loss "
                f"{held['found']:.4f} against {held['current']:.4f}; nothing was changed"
            )
        made = await aside(
            registry.add_revision,
            name,
            profile,
            actor=actor,
            adapter_digest=current.adapter_digest,
            source=current.source,
            expected=params["expected"],
        )
    return await bring_in(tenancy, work, made)


def space_of(header: FamilyHeader, floor: Mapping[int, float]) -> Space:
    """The family's bounds, raised to its floor. Errors: ConfigError if nothing can move."""
    low, high = header.bounds
    lower = tuple(max(low, floor.get(entry.layer, low)) for entry in header.layers)
    return Space(lower, (high,) * len(lower))


async def _made_before(tenancy: Tenancy, work: Work) -> Revision | None:
    """The revision that an earlier attempt of this job has added."""
    for known in reversed(await aside(tenancy.registry.revisions, work.job.tenant)):
        calibration = known.profile.calibration
        if calibration.get("method") == METHOD and calibration.get("job") == work.job.id:
            return known
    return None


async def _better(tenancy: Tenancy, work: Work, current: Revision) -> Profile | None:
    """A profile with a lower held-out loss than the current one's; None if none was found."""
    settings, params = tenancy.settings.calibration, work.job.params
    await work.step(0.0, "reading the examples")
    shots = read_shots(params[PRIVATE]["examples"], settings)
    searched, held = split(shots, settings.held_out, params["seed"])
    header = tenancy.replica.header
    policy = await aside(tenancy.registry.policy, header.digest)
    space = space_of(header, policy.floor)
    share = Share(settings.share, tenancy.replica.in_flight, lambda: _check(work))
    objective = objective_of(settings, weights_of(settings, list(shots)))
    bench = Bench(tenancy.replica, current, objective, settings, share)
    low, high = header.bounds
    await bench.prepare(searched, held, (min(max(0.0, low), high),) * len(header.layers))
    await work.step(0.03, "scoring what there is")
    zero = await bench.look(space.scaled(0.0))
    now = tuple(current.profile.coefficients[entry.layer] for entry in header.layers)
    served = zero if now == zero.at else await bench.look(now)

    async def tell(tried: int, what: str) -> None:
        done = min(tried / params["evaluations"], 1.0)
        await work.step(0.05 + (SEARCH_ENDS - 0.05) * done, what)

    found = await search(
        space,
        bench.evaluate,
        [zero, served],
        budget=params["evaluations"],
        patience=settings.patience,
        seed=params["seed"],
        tell=tell,
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
        "shots": record_of(shots, held),
        "data": dict(params["data"]),
        "rounds": found.rounds,
        "before": _rounded(zero.parts),
        "current": _rounded(served.parts),
        "after": _rounded(found.best.parts),
        **outcome,
    }
    values = dict(zip((entry.layer for entry in header.layers), found.best.at, strict=True))
    return make_profile(header, values, record)


def _check(work: Work) -> None:
    """Errors: JobCancelledError."""
    if work.cancelled.is_set():
        raise JobCancelledError("the job was cancelled")


def _held(look: Look) -> float:
    return math.inf if look.held is None else look.held


def _rounded(parts: Losses | None) -> dict[str, float] | None:
    return None if parts is None else {kind: round(loss, 6) for kind, loss in parts.items()}
