"""What may be done to a tenant, one function each; every one takes the `actor` who asked.

New content goes through a job, since it may take minutes; new coefficients for the same adapter,
a rollback and the rest are done when the function returns, and live in this process.
"""

from __future__ import annotations

from asyncio import ensure_future
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safegene_server.error_responses import EngineDownError
from safegene_server.registry import Job, Revision, Rollout, RolloutStatus, Tenant
from safegene_server.registry.jobs import PRIVATE
from safegene_server.registry.revisions import check_expected
from safegene_server.tenants.context import TenantContext, aside
from safegene_server.tenants.onboarding import ONBOARD, fail, gated
from safegene_server.tenants.profiles import Change, changed_profile, first_profile
from safegene_vllm.errors import ConflictError, FrozenError, RegistryDownError, SafegeneError
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, profile_json

ROLLOUTS_SEARCHED = 1000


@dataclass(frozen=True)
class Published:
    """What a tenant serves now, and how far replicas follow the rollout that led to it.

    `status` is None where nothing had to change and the one that did is long past.
    """

    revision: Revision
    status: RolloutStatus | None


async def register(
    tenancy: TenantContext,
    name: str,
    *,
    source: str | None,
    first: Change,
    limits: Mapping[str, int],
    publish: bool,
    actor: str,
) -> tuple[Tenant, Job]:
    """A new tenant of this server's family, and the job that brings it into service.

    The same registration again answers with the same tenant and job.
    Errors: RegistryError, ConflictError (the name is taken), FrozenError, FormatError, BoundsError.
    """
    params = _params(tenancy.replica.header, source, first, publish, None, actor)
    return await enroll(tenancy, name, ONBOARD, params, source=source, limits=limits, actor=actor)


async def enroll(
    tenancy: TenantContext,
    name: str,
    kind: str,
    params: Mapping[str, Any],
    *,
    source: str | None,
    limits: Mapping[str, int],
    actor: str,
) -> tuple[Tenant, Job]:
    """A new tenant, and a job of `kind` to bring it in; the same again answers with the same two.

    What is private in `params` is forgotten with the job, so the rest must tell two jobs apart.
    Errors: RegistryError, ConflictError (the name is taken), FrozenError.
    """
    registry, family = tenancy.registry, tenancy.replica.header
    try:
        tenant = await aside(
            registry.tenants.add, name, family.digest, actor=actor, source=source, limits=limits
        )
    except ConflictError:
        tenant = await aside(registry.tenants.get, name)
        asked = (family.digest, source, dict(limits), "active")
        if asked != (tenant.family, tenant.source, dict(tenant.limits), tenant.state):
            raise
        for job in (jobs := await aside(registry.jobs.list, tenant=name)):
            same = (job.kind, _told(job.params)) == (kind, _told(params))
            if same and job.state in ("queued", "running", "done"):
                return tenant, job
        revisions = await aside(registry.revisions.list, name)
        if jobs or revisions:
            raise
    return tenant, await enqueue(tenancy, name, kind, params, actor)


async def add_revision(
    tenancy: TenantContext,
    name: str,
    *,
    source: str | None,
    first: Change,
    publish: bool,
    expected: int | None,
    actor: str,
) -> Job:
    """New content for a tenant; where it came from last is read again if no source is given.

    Errors: NotFoundError, ConflictError, FrozenError, FormatError, BoundsError.
    """
    tenant = await changeable(tenancy, name, expected)
    where = source or await last_source(tenancy, tenant)
    params = _params(tenancy.replica.header, where, first, publish, expected, actor)
    return await enqueue(tenancy, name, ONBOARD, params, actor)


async def change_profile(
    tenancy: TenantContext, name: str, change: Change, *, expected: int | None, actor: str
) -> Published:
    """Other coefficients for the adapter that is served; nothing happens if they are the same.

    Errors: NotFoundError, ConflictError, FrozenError, FormatError, FamilyMismatchError,
    BoundsError; AdapterRejectedError, ReceiptError and EngineDownError of the engine.
    """
    async with tenancy.changing(name):
        tenant, current = await aside(tenancy.registry.revisions.published, name)
        check_ours(tenancy, tenant)
        check_expected(tenant, expected)
        if current is None:
            await refuse_unchangeable(tenancy, tenant)
            raise ConflictError(
                f"tenant {name!r} serves nothing whose coefficients could be changed; add a "
                "revision"
            )
        profile = changed_profile(tenancy.replica.header, current, change)
        if profile is current.profile:
            return Published(current, await _rollout_to(tenancy, current))
        making = ensure_future(aside(_make_directory, tenancy, current.adapter_digest, profile))
        revision = await aside(
            tenancy.registry.revisions.add,
            name,
            profile,
            actor=actor,
            adapter_digest=current.adapter_digest,
            source=current.source,
            expected=current.number,
        )
        path = await making
        async with tenancy.trying(revision):
            gate = await _prove(tenancy, revision, path, current, actor)
            rollout = await _switch(tenancy, revision, current.number, actor, gate)
        return await _live(tenancy, rollout)


async def publish(
    tenancy: TenantContext, name: str, number: int, *, expected: int | None, actor: str
) -> Published:
    """Serve a revision that is ready or was served before. Errors: as for `change_profile`."""
    async with tenancy.changing(name):
        tenant = await _known(tenancy, name)
        check_expected(tenant, expected)
        revision = await aside(tenancy.registry.revisions.get, name, number)
        if tenant.published == number:
            return Published(revision, await _rollout_to(tenancy, revision))
        async with AsyncExitStack() as stack:
            if revision.state in ("ready", "superseded") and _is_ours(tenancy, tenant):
                await refuse_unchangeable(tenancy, tenant)
                await stack.enter_async_context(tenancy.trying(revision))
                await tenancy.replica.load(revision)
            rollout = await _switch(tenancy, revision, expected, actor)
        return await _live(tenancy, rollout)


async def roll_back(
    tenancy: TenantContext, name: str, number: int | None, *, expected: int | None, actor: str
) -> Published:
    """Serve what was served before, or before that, `number`. Errors: as for `change_profile`.

    What it goes back to is loaded first, so that a copy that is gone changes nothing.
    """
    async with tenancy.changing(name):
        tenant = await _known(tenancy, name)
        check_expected(tenant, expected)
        if number is None:
            snapshot = await aside(tenancy.registry.snapshot)
            number = next((r.number for r in snapshot.previous if r.tenant == name), None)
        go_back = partial(tenancy.registry.rollouts.rollback, actor=actor, expected=expected)
        async with AsyncExitStack() as stack:
            if number is not None and _is_ours(tenancy, tenant):
                await refuse_unchangeable(tenancy, tenant)
                revision = await aside(tenancy.registry.revisions.get, name, number)
                if revision.state in ("superseded", "published"):
                    await stack.enter_async_context(tenancy.trying(revision))
                    await tenancy.replica.load(revision)
                    go_back = partial(go_back, checked=revision.identity)
            rollout = await aside(go_back, name, number)
        return await _live(tenancy, rollout)


async def retire(
    tenancy: TenantContext, name: str, *, expected: int | None, actor: str
) -> tuple[Tenant, Rollout | None]:
    """Serve a tenant no more, ever; its jobs are cancelled. Nothing happens if it is retired.

    Errors: NotFoundError, ConflictError, FrozenError.
    """
    async with tenancy.changing(name):
        tenant = await _known(tenancy, name)
        if tenant.state == "retired":
            return tenant, None
        rollout = await aside(
            tenancy.registry.rollouts.retire, name, actor=actor, expected=expected
        )
        for job in await aside(tenancy.registry.jobs.list, tenant=name):
            if job.state in ("queued", "running"):
                with suppress(ConflictError):
                    await aside(tenancy.registry.jobs.cancel, job.id, actor=actor)
        await tenancy.settle()
        return await _known(tenancy, name), rollout


async def set_frozen(tenancy: TenantContext, name: str, frozen: bool, *, actor: str) -> Tenant:
    """Serving goes on; what is served may not change. Errors: NotFoundError, ConflictError."""
    registry = tenancy.registry
    step = registry.tenants.freeze if frozen else registry.tenants.unfreeze
    tenant = await aside(step, name, actor=actor)
    await tenancy.settle()
    return tenant


async def set_limits(
    tenancy: TenantContext, name: str, limits: Mapping[str, int], *, actor: str
) -> Tenant:
    """Errors: NotFoundError, ConflictError, RegistryError."""
    tenant = await aside(tenancy.registry.tenants.set_limits, name, limits, actor=actor)
    await tenancy.settle()
    return tenant


def _params(
    family: FamilyHeader,
    source: str | None,
    first: Change,
    publish: bool,
    expected: int | None,
    actor: str,
) -> dict[str, Any]:
    """What an onboarding job works from; the profile is checked before anybody waits for it."""
    profile = first_profile(family, first)
    if source is None and profile is None:
        raise ConflictError(
            "neither a source nor a profile is given; a tenant is an adapter, a profile or both"
        )
    return {
        "source": source,
        "profile": None if profile is None else profile_json(profile),
        "publish": publish,
        "expected": expected,
        "actor": actor,
    }


async def enqueue(
    tenancy: TenantContext, name: str, kind: str, params: Mapping[str, Any], actor: str
) -> Job:
    """A job of the tenant, looked at without delay. Errors: RegistryError, NotFoundError."""
    job = await aside(tenancy.registry.jobs.enqueue, kind, name, actor=actor, params=params)
    tenancy.job_added.set()
    return job


def _told(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != PRIVATE}


async def _known(tenancy: TenantContext, name: str) -> Tenant:
    return await aside(tenancy.registry.tenants.get, name)


def _is_ours(tenancy: TenantContext, tenant: Tenant) -> bool:
    return tenant.family == tenancy.replica.header.digest


async def ours(tenancy: TenantContext, name: str) -> Tenant:
    """Errors: NotFoundError; those of `check_ours`."""
    tenant = await _known(tenancy, name)
    check_ours(tenancy, tenant)
    return tenant


def check_ours(tenancy: TenantContext, tenant: Tenant) -> None:
    """Errors: ConflictError for a tenant that this engine cannot load."""
    if not _is_ours(tenancy, tenant):
        raise ConflictError(
            f"tenant {tenant.name!r} belongs to family {tenant.family}, this server serves "
            f"{tenancy.replica.header.name!r} {tenancy.replica.header.digest}; ask a server of "
            "that family"
        )


async def changeable(tenancy: TenantContext, name: str, expected: int | None) -> Tenant:
    """A tenant that may have new content. Errors: those of `ours`; ConflictError (not `expected`
    is published, or it is retired), FrozenError."""
    tenant = await ours(tenancy, name)
    check_expected(tenant, expected)
    await refuse_unchangeable(tenancy, tenant)
    return tenant


async def last_source(tenancy: TenantContext, tenant: Tenant) -> str | None:
    """Where the revision that is served came from, or else the newest; before there is one, what
    the tenant was registered with."""
    revisions = await aside(tenancy.registry.revisions.list, tenant.name)
    served = [revision for revision in revisions if revision.number == tenant.published]
    sources = [revision.source for revision in served or revisions]
    return (sources[-1] if sources else None) or tenant.source


async def refuse_unchangeable(tenancy: TenantContext, tenant: Tenant) -> None:
    """Before the engine is troubled; the registry refuses once more. Errors: ConflictError,
    FrozenError."""
    if tenant.state == "retired":
        raise ConflictError(
            f"tenant {tenant.name!r} is retired and changes no more; add another tenant"
        )
    if tenant.state == "frozen":
        raise FrozenError(f"tenant {tenant.name!r} is frozen; unfreeze it before it is changed")
    if (await aside(tenancy.registry.policies.get, tenant.family)).frozen:
        raise FrozenError(
            f"family {tenant.family} is frozen, and tenant {tenant.name!r} with it; unfreeze the "
            "family first"
        )


def _make_directory(
    tenancy: TenantContext, adapter_digest: str | None, profile: Profile
) -> Path | None:
    """Make the directory that the engine loads a revision from, while the registry adds it. Blocks.

    None on an error: loading the revision tries again, and raises it.
    """
    try:
        return tenancy.store.revision(adapter_digest, profile)
    except Exception:
        return None


async def _prove(
    tenancy: TenantContext, revision: Revision, path: Path | None, current: Revision, actor: str
) -> dict[str, Any]:
    """Loaded with its receipts and, if so set, tried out; else it is kept as failed."""
    gate: dict[str, Any] = {"made_from": current.served_name}
    try:
        await tenancy.replica.load(revision, path)
        if tenancy.settings.gate_on_change:
            gate |= await gated(tenancy.replica, revision, tenancy.settings)
    except (RegistryDownError, EngineDownError):
        raise
    except Exception as error:
        await fail(tenancy, revision, error, actor)
        raise
    return gate


async def _switch(
    tenancy: TenantContext,
    revision: Revision,
    expected: int | None,
    actor: str,
    gate: dict[str, Any] | None = None,
) -> Rollout:
    """`gate` is what was found of a revision that is new, and so far not ready."""
    try:
        return await aside(
            tenancy.registry.rollouts.publish,
            revision.tenant,
            revision.number,
            actor=actor,
            expected=expected,
            gate=gate,
            checked=revision.identity,
        )
    except SafegeneError:
        if gate is not None:
            # It has passed all the same, and may be published later.
            stand = partial(tenancy.registry.revisions.set_state, revision.id, "ready", actor=actor)
            await aside(stand, gate=gate, checked=revision.identity)
        raise


async def _live(tenancy: TenantContext, rollout: Rollout) -> Published:
    """What a switch has led to, followed by this server."""
    await tenancy.settle()
    status = await aside(tenancy.registry.rollouts.status, rollout.id)
    return Published(status.revisions[0], status)


async def _rollout_to(tenancy: TenantContext, revision: Revision) -> RolloutStatus | None:
    """The newest rollout that led to this revision."""
    rollouts = await aside(tenancy.registry.rollouts.list, limit=ROLLOUTS_SEARCHED)
    found = next((r.id for r in rollouts if revision.id in r.revisions), None)
    return None if found is None else await aside(tenancy.registry.rollouts.status, found)
