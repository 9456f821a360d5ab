"""Operations on a tenant, one function each; `actor` is the name of the requesting key.

New content goes through a job, since it may take minutes. New coefficients for the same adapter, a
rollback and the rest are applied in this process when the function returns.
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
from safegene_server.tenants.onboarding import ONBOARD, fail, pass_smoke_test
from safegene_server.tenants.profiles import Change, changed_profile, first_profile
from safegene_vllm.errors import ConflictError, FrozenError, RegistryDownError, SafegeneError
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, profile_json

ROLLOUTS_SEARCHED = 1000


@dataclass(frozen=True)
class Published:
    """A tenant's published revision, and how far replicas follow its rollout.

    `status` is None if nothing changed and the rollout is no longer among the last ones.
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
    """Register a tenant of this server's family and start the job that onboards it.

    Idempotent: the same registration returns the same tenant and job.
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
    """Add a tenant and start its job of `kind`; idempotent, as `register`.

    One that never served anything, because its jobs failed, is taken up again with what is given
    now. Private `params` are deleted when the job ends, so the others must distinguish two jobs.
    Errors: RegistryError, ConflictError (the name is taken), FrozenError.
    """
    registry, family = tenancy.registry, tenancy.replica.header
    try:
        tenant = await aside(
            registry.tenants.add, name, family.digest, actor=actor, source=source, limits=limits
        )
    except ConflictError:
        tenant = await aside(registry.tenants.get, name)
        given = (family.digest, source, dict(limits), "active")
        if given == (tenant.family, tenant.source, dict(tenant.limits), tenant.state):
            for job in await aside(registry.jobs.list, tenant=name):
                same = (job.kind, _public_params(job.params)) == (kind, _public_params(params))
                if same and job.state in ("queued", "running", "done"):
                    return tenant, job
        tenant = await aside(
            registry.tenants.restart,
            name,
            family.digest,
            actor=actor,
            source=source,
            limits=limits,
        )
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
    """Start the job that onboards new content; without a source, the last one is read again.

    Errors: NotFoundError, ConflictError, FrozenError, FormatError, BoundsError.
    """
    tenant = await changeable(tenancy, name, expected)
    where = source or await last_source(tenancy, tenant)
    params = _params(tenancy.replica.header, where, first, publish, expected, actor)
    return await enqueue(tenancy, name, ONBOARD, params, actor)


async def change_profile(
    tenancy: TenantContext, name: str, change: Change, *, expected: int | None, actor: str
) -> Published:
    """Change the coefficients of the served adapter; nothing happens if they are the same.

    Errors: NotFoundError, ConflictError, FrozenError, FormatError, FamilyMismatchError,
    BoundsError; AdapterRejectedError, ReceiptError and EngineDownError of the engine.
    """
    async with tenancy.changing(name):
        tenant, current = await aside(tenancy.registry.revisions.published, name)
        check_ours(tenancy, tenant)
        check_expected(tenant, expected)
        if current is None:
            await check_changeable(tenancy, tenant)
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
        async with tenancy.unloading_on_error(revision):
            gate = await _prove(tenancy, revision, path, current, actor)
            rollout = await _switch(tenancy, revision, current.number, actor, gate)
        return await _live(tenancy, rollout)


async def publish(
    tenancy: TenantContext, name: str, number: int, *, expected: int | None, actor: str
) -> Published:
    """Publish a revision that is ready or was served before. Errors: as for `change_profile`."""
    async with tenancy.changing(name):
        tenant = await _known(tenancy, name)
        check_expected(tenant, expected)
        revision = await aside(tenancy.registry.revisions.get, name, number)
        if tenant.published == number:
            return Published(revision, await _rollout_to(tenancy, revision))
        async with AsyncExitStack() as stack:
            if revision.state in ("ready", "superseded") and _is_ours(tenancy, tenant):
                await check_changeable(tenancy, tenant)
                await stack.enter_async_context(tenancy.unloading_on_error(revision))
                await tenancy.replica.load(revision)
            rollout = await _switch(tenancy, revision, expected, actor)
        return await _live(tenancy, rollout)


async def roll_back(
    tenancy: TenantContext, name: str, number: int | None, *, expected: int | None, actor: str
) -> Published:
    """Publish the revision served before, or `number`. Errors: as for `change_profile`.

    It is loaded first, so that a missing copy changes nothing.
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
                await check_changeable(tenancy, tenant)
                revision = await aside(tenancy.registry.revisions.get, name, number)
                if revision.state in ("superseded", "published"):
                    await stack.enter_async_context(tenancy.unloading_on_error(revision))
                    await tenancy.replica.load(revision)
                    go_back = partial(go_back, checked=revision.identity)
            rollout = await aside(go_back, name, number)
        return await _live(tenancy, rollout)


async def retire(
    tenancy: TenantContext, name: str, *, expected: int | None, actor: str
) -> tuple[Tenant, Rollout | None]:
    """Retire a tenant for good and cancel its jobs. Nothing happens if it is retired.

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
    """Freeze or unfreeze a tenant's content. Errors: NotFoundError, ConflictError."""
    registry = tenancy.registry
    step = registry.tenants.freeze if frozen else registry.tenants.unfreeze
    tenant = await aside(step, name, actor=actor)
    await tenancy.settle()
    return tenant


async def set_limits(
    tenancy: TenantContext, name: str, limits: Mapping[str, int], *, actor: str
) -> Tenant:
    """Set a tenant's limits. Errors: NotFoundError, ConflictError, RegistryError."""
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
    """Parameters of an onboarding job; the profile is checked before it is enqueued."""
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
    """Enqueue a job of the tenant and wake the runner. Errors: RegistryError, NotFoundError."""
    job = await aside(tenancy.registry.jobs.enqueue, kind, name, actor=actor, params=params)
    tenancy.job_added.set()
    return job


def _public_params(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != PRIVATE}


async def _known(tenancy: TenantContext, name: str) -> Tenant:
    return await aside(tenancy.registry.tenants.get, name)


def _is_ours(tenancy: TenantContext, tenant: Tenant) -> bool:
    return tenant.family == tenancy.replica.header.digest


async def ours(tenancy: TenantContext, name: str) -> Tenant:
    """Return a tenant of this engine's family. Errors: NotFoundError; those of `check_ours`."""
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
    """Return a tenant that may have new content. Errors: as `ours`; ConflictError, FrozenError."""
    tenant = await ours(tenancy, name)
    check_expected(tenant, expected)
    await check_changeable(tenancy, tenant)
    return tenant


async def last_source(tenancy: TenantContext, tenant: Tenant) -> str | None:
    """Source of the served, or else newest, revision; without one, that of the registration."""
    revisions = await aside(tenancy.registry.revisions.list, tenant.name)
    served = [revision for revision in revisions if revision.number == tenant.published]
    sources = [revision.source for revision in served or revisions]
    return (sources[-1] if sources else None) or tenant.source


async def check_changeable(tenancy: TenantContext, tenant: Tenant) -> None:
    """Check before the engine loads anything. Errors: ConflictError, FrozenError."""
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
    """Make a revision's directory in the store. Blocks; None on an error, which the load raises."""
    try:
        return tenancy.store.revision(adapter_digest, profile)
    except Exception:
        return None


async def _prove(
    tenancy: TenantContext, revision: Revision, path: Path | None, current: Revision, actor: str
) -> dict[str, Any]:
    """Load, verify and, if so set, smoke-test a revision; one that does not pass is failed."""
    gate: dict[str, Any] = {"made_from": current.served_name}
    try:
        await tenancy.replica.load(revision, path)
        if tenancy.settings.gate_on_change:
            gate |= await pass_smoke_test(tenancy.replica, revision, tenancy.settings)
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
    """Publish a revision; `gate` is the record of a new one, which is not ready yet."""
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
            # It has passed, and may be published later.
            stand = partial(tenancy.registry.revisions.set_state, revision.id, "ready", actor=actor)
            await aside(stand, gate=gate, checked=revision.identity)
        raise


async def _live(tenancy: TenantContext, rollout: Rollout) -> Published:
    """Follow a rollout on this server and return its state."""
    await tenancy.settle()
    status = await aside(tenancy.registry.rollouts.status, rollout.id)
    return Published(status.revisions[0], status)


async def _rollout_to(tenancy: TenantContext, revision: Revision) -> RolloutStatus | None:
    """Status of the newest rollout that published this revision."""
    rollouts = await aside(tenancy.registry.rollouts.list, limit=ROLLOUTS_SEARCHED)
    found = next((r.id for r in rollouts if revision.id in r.revisions), None)
    return None if found is None else await aside(tenancy.registry.rollouts.status, found)
