"""The beginning of a calibration: everything that can be refused before anybody waits for it.

Of what a tenant has, or of new content that comes without a profile. The examples lie in the job's
private parameters, which the registry forgets when the job ends; their digests stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safegene_server.calibration.examples import KINDS, read_shots
from safegene_server.calibration.job import CALIBRATE, space_of
from safegene_server.calibration.search import LEAST_BUDGET
from safegene_server.registry import Job, Revision, Tenant
from safegene_server.registry.jobs import PRIVATE
from safegene_server.tenants import Change, TenantContext
from safegene_server.tenants.context import aside
from safegene_server.tenants.service import changeable, enqueue, enrol, last_source
from safegene_vllm.dataset import digest_of_rows
from safegene_vllm.errors import BoundsError, ConfigError, ConflictError

RECORD_BYTES = 1 << 14


@dataclass(frozen=True)
class CalibrationRequest:
    """What a search works from: `examples` by kind, `data` that tells the record where they are
    from, and how many candidates at most (None: the server's own number)."""

    examples: Mapping[str, Any]
    data: Mapping[str, Any] | None = None
    seed: int = 0
    evaluations: int | None = None


async def start(
    tenancy: TenantContext,
    name: str,
    asked: CalibrationRequest,
    *,
    publish: bool,
    expected: int | None,
    actor: str,
) -> Job:
    """The job that looks for better coefficients of what the tenant serves, or of its newest
    revision while it serves nothing.

    Errors: ConfigError, NotFoundError, ConflictError, FrozenError.
    """
    params = await _params(tenancy, asked, publish, actor)
    tenant = await changeable(tenancy, name, expected)
    revision = await _revision(tenancy, name, tenant.published)
    params |= {"revision": revision.number, "expected": tenant.published or 0}
    return await enqueue(tenancy, name, CALIBRATE, params, actor)


async def register(
    tenancy: TenantContext,
    name: str,
    asked: CalibrationRequest,
    *,
    source: str | None,
    first: Change,
    limits: Mapping[str, int],
    publish: bool,
    actor: str,
) -> tuple[Tenant, Job]:
    """A new tenant of this server's family, and the job that finds its coefficients and brings it
    into service. The same registration again answers with the same tenant and job.

    Errors: ConfigError, BoundsError (`first` gives coefficients too), RegistryError, ConflictError
    (no source, or the name is taken), FrozenError.
    """
    params = await _params(tenancy, asked, publish, actor)
    params |= {"source": _searchable(source, first), "expected": 0}
    return await enrol(tenancy, name, CALIBRATE, params, source=source, limits=limits, actor=actor)


async def add_revision(
    tenancy: TenantContext,
    name: str,
    asked: CalibrationRequest,
    *,
    source: str | None,
    first: Change,
    publish: bool,
    expected: int | None,
    actor: str,
) -> Job:
    """New content for a tenant, whose coefficients the job finds; where it came from last is read
    again if no source is given.

    Errors: ConfigError, BoundsError, NotFoundError, ConflictError, FrozenError.
    """
    params = await _params(tenancy, asked, publish, actor)
    tenant = await changeable(tenancy, name, expected)
    where = _searchable(source or await last_source(tenancy, tenant), first)
    params |= {"source": where, "expected": tenant.published or 0}
    return await enqueue(tenancy, name, CALIBRATE, params, actor)


async def _params(
    tenancy: TenantContext, asked: CalibrationRequest, publish: bool, actor: str
) -> dict[str, Any]:
    """What every such job works from. Errors: ConfigError."""
    settings, header = tenancy.settings.calibration, tenancy.replica.header
    shots = read_shots(asked.examples, settings)
    budget = settings.evaluations if asked.evaluations is None else asked.evaluations
    if budget < LEAST_BUDGET:
        raise ConfigError(f"evaluations = {budget}, expected at least {LEAST_BUDGET}")
    told = _data(asked.data)
    space_of(header, (await aside(tenancy.registry.policy, header.digest)).floor)
    return {
        "data": told,
        "seed": asked.seed,
        "evaluations": budget,
        "publish": publish,
        "actor": actor,
        "shots": {kind: digest_of_rows(rows) for kind, rows in shots.items()},
        PRIVATE: {"examples": {kind: list(asked.examples.get(kind) or ()) for kind in KINDS}},
    }


def _searchable(source: str | None, first: Change) -> str:
    """Errors: BoundsError, ConflictError."""
    if first.form is not None:
        raise BoundsError(
            f"calibrate and {first.form} are given; expected one of them: what calibrate finds are "
            "the coefficients"
        )
    if source is None:
        raise ConflictError(
            "calibrate is given without a source; give the adapter whose coefficients are to be "
            "found"
        )
    return source


async def _revision(tenancy: TenantContext, name: str, published: int | None) -> Revision:
    if published is not None:
        return await aside(tenancy.registry.revision, name, published)
    revisions = await aside(tenancy.registry.revisions, name)
    if not revisions:
        raise ConflictError(
            f"tenant {name!r} has no revision whose coefficients could be calibrated; add one, "
            "with these examples as its `calibrate`"
        )
    return revisions[-1]


def _data(data: Mapping[str, Any] | None) -> dict[str, Any]:
    """Errors: ConfigError for records that are no records."""
    found = dict(data or {})
    if unknown := sorted(set(found) - set(KINDS)):
        raise ConfigError(f"data: {', '.join(unknown)[:200]}: expected {', '.join(KINDS)}")
    size_bytes = len(json.dumps(found))
    if size_bytes > RECORD_BYTES:
        raise ConfigError(
            f"data: {size_bytes} bytes of JSON, expected at most {RECORD_BYTES}; it tells where "
            "the examples are from and holds none"
        )
    return found
