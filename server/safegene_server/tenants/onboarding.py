"""Job that onboards new content of a tenant: stage, check, load, smoke-test, publish.

Every step may run twice, since a job is restarted when its server died. A tenant whose new content
fails keeps its served revision; the failed revision has the reasons.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from safegene_server.artifacts import Staged, Watch
from safegene_server.error_responses import EngineDownError, public_message
from safegene_server.registry import Revision
from safegene_server.tenants.context import Replica, TenantContext, aside
from safegene_server.tenants.jobs import JobLostError, Work
from safegene_server.tenants.profiles import check_record
from safegene_server.tenants.settings import TenantSettings
from safegene_server.tenants.smoke_prompts import read_prompts
from safegene_server.tenants.smoke_test import run_smoke_test
from safegene_vllm.errors import (
    AdapterRejectedError,
    ConflictError,
    RegistryDownError,
    SafegeneError,
    SourceError,
)
from safegene_vllm.formats.profile import Profile, parse_profile

ONBOARD = "onboard"
UNEXPECTED = "a check failed unexpectedly; the server's log says why"
OFF = {"skipped": "the gate is switched off in this server's settings"}


async def onboard(tenancy: TenantContext, work: Work) -> str:
    """Handler of ONBOARD. `params`: source, profile (whole or None), publish, expected, actor.

    Errors: SafegeneError, EngineDownError; JobLostError.
    """
    params = work.job.params
    staged = await stage(tenancy, work, params["source"])
    await work.step(0.3, "checking")
    profile = _profile(work, params["profile"], staged)
    # Two jobs with the same content for one tenant: the second finds the first one's revision.
    async with tenancy.changing(f"{ONBOARD} {work.job.tenant}"):
        return await check_and_publish(
            tenancy, work, await _revision(tenancy, work, staged, profile)
        )


async def check_and_publish(tenancy: TenantContext, work: Work, revision: Revision) -> str:
    """Load, smoke-test and publish a job's revision, as far as that is not done yet.

    `params`: publish, expected, actor. Errors: as for `onboard`.
    """
    publish = work.job.params["publish"]
    work.result["revision"] = revision.served_name
    if revision.state == "failed":
        reasons = "; ".join(revision.reasons)
        raise AdapterRejectedError(reasons, public=reasons)
    if revision.state in ("published", "superseded", "retired"):
        return f"{revision.served_name} was published before this job was begun again"
    async with tenancy.unloading_on_error(revision):
        ready = await _prove(tenancy, work, revision)
        if publish:
            return await _publish(tenancy, work, ready)
    await tenancy.unload(ready)
    return f"{ready.served_name} is ready; publish it to serve it"


async def pass_smoke_test(
    replica: Replica, revision: Revision, settings: TenantSettings
) -> dict[str, Any]:
    """Run the smoke test of a loaded revision and return its record.

    Errors: GateError with every reason and the record; those of `run_smoke_test`.
    """
    if not settings.gate.enabled:
        return dict(OFF)
    prompts = await asyncio.to_thread(read_prompts, settings.gate.prompts)
    outcome = await run_smoke_test(replica, revision.served_name, prompts, settings.gate)
    if not outcome.passed:
        raise GateError(revision, outcome.reasons, outcome.record)
    return outcome.record


class GateError(AdapterRejectedError):
    """The revision's completions miss the thresholds of the smoke test; names what to do next."""

    def __init__(
        self, revision: Revision, reasons: tuple[str, ...], record: Mapping[str, Any]
    ) -> None:
        name = revision.tenant
        calibrate = (
            f"; or have them found: safegene tenant calibrate {name} --safety ... --task ... "
            f"(POST /v1/safegene/tenants/{name}/calibrate)"
        ) * (revision.kind == "adapter")
        hint = (
            f"next, with other coefficients: safegene tenant update {name} --coefficient X "
            f"(POST /v1/safegene/tenants/{name}/revisions){calibrate}"
        )
        message = "; ".join(reasons) + f"\n{hint}"
        # It quotes a route, which looks like a path of the server, and nothing that is one.
        super().__init__(message, public=message)
        self.record = record


async def fail(tenancy: TenantContext, revision: Revision, error: Exception, actor: str) -> None:
    """Mark the revision as failed, with the reasons."""
    gate = error.record if isinstance(error, GateError) else None
    reasons = [UNEXPECTED]
    if isinstance(error, SafegeneError):
        reasons = public_message(error).splitlines()
    await aside(
        tenancy.registry.revisions.set_state,
        revision.id,
        "failed",
        actor=actor,
        reasons=reasons,
        gate=gate,
        checked=revision.identity,
    )


async def stage(tenancy: TenantContext, work: Work, source: str | None) -> Staged | None:
    """Fetch and check a job's content; a cancel stops the fetch.

    Errors: those of `Store.stage`; JobCancelledError, JobLostError.
    """
    await work.step(0.0, "staging" if source else "starting")
    if source is None:
        return None
    watch = Watch(cancelled=work.cancelled)
    try:
        return await aside(tenancy.store.stage, source, family=tenancy.replica.header, watch=watch)
    except SourceError:
        # Raises JobCancelledError in place of the error of a fetch that was stopped.
        await work.step(0.0, "staging")
        raise


def _profile(work: Work, given: Mapping[str, Any] | None, staged: Staged | None) -> Profile:
    if given is not None:
        return parse_profile(given, "profile")
    if staged is not None and staged.profile is not None:
        check_record(staged.profile)
        return staged.profile
    raise AdapterRejectedError(
        f"tenant {work.job.tenant!r} has no profile: none was given, and none is next to its "
        "adapter. Have one found on this engine, with `calibrate` and a few examples in a revision "
        "(`safegene tenant update ... --calibrate-safety ... --calibrate-task ...`); or make one "
        "with `safegene calibrate` and put its safegene.json next to the adapter; or give "
        "coefficients"
    )


async def _revision(
    tenancy: TenantContext, work: Work, staged: Staged | None, profile: Profile
) -> Revision:
    """Return the revision that an earlier attempt of this job added, or add one."""
    registry, job, actor = tenancy.registry, work.job, work.job.params["actor"]
    digest = None if staged is None else staged.digest
    for known in reversed(await aside(registry.revisions.list, job.tenant)):
        same = (known.adapter_digest, known.profile.digest) == (digest, profile.digest)
        if same and known.created_by == actor and known.created_at >= job.created_at:
            return known
    return await aside(
        registry.revisions.add,
        job.tenant,
        profile,
        actor=actor,
        adapter_digest=digest,
        source=job.params["source"],
        expected=job.params["expected"],
    )


async def _prove(tenancy: TenantContext, work: Work, revision: Revision) -> Revision:
    """Load, verify and smoke-test a revision; one that does not pass is marked as failed."""
    actor, checked = work.job.params["actor"], revision.identity
    stand = partial(tenancy.registry.revisions.set_state, revision.id, actor=actor, checked=checked)
    if revision.state == "registered":
        revision = await aside(stand, "checking")
    try:
        await work.step(0.4, "loading")
        await tenancy.replica.load(revision)
        if revision.state == "ready":
            return revision
        await work.step(0.5, "running the smoke test")
        gate = await pass_smoke_test(tenancy.replica, revision, tenancy.settings)
        await work.step(0.9, "publishing" if work.job.params["publish"] else "ending")
    except (RegistryDownError, EngineDownError, JobLostError):
        raise
    except Exception as error:
        await fail(tenancy, revision, error, actor)
        raise
    return await aside(stand, "ready", gate=gate)


async def _publish(tenancy: TenantContext, work: Work, revision: Revision) -> str:
    params = work.job.params
    try:
        rollout = await aside(
            tenancy.registry.rollouts.publish,
            revision.tenant,
            revision.number,
            actor=params["actor"],
            expected=params["expected"],
            checked=revision.identity,
        )
    except ConflictError:
        # It may have been published by an earlier attempt, or over HTTP.
        now = await aside(tenancy.registry.revisions.get_by_id, revision.id)
        if now.state != "published" or now.identity != revision.identity:
            # It stays ready, and can be published once the conflict is over.
            raise
    else:
        work.result["rollout"] = rollout.id
    await tenancy.settle()
    return f"{revision.served_name} is published"
