"""Start of a calibration, after every check that needs no job.

It calibrates an existing revision, or new content without a profile. The examples are stored in the
job's private parameters, which the registry deletes when the job ends; their digests stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safegene_server.calibration.examples import KINDS, read_examples
from safegene_server.calibration.job import CALIBRATE, space_of
from safegene_server.calibration.search import MIN_BUDGET
from safegene_server.registry import Job, Revision, Tenant
from safegene_server.registry.jobs import PRIVATE
from safegene_server.tenants import Change, TenantContext
from safegene_server.tenants.context import aside
from safegene_server.tenants.service import changeable, enqueue, enroll, last_source
from safegene_vllm.dataset import digest_of_rows
from safegene_vllm.errors import BoundsError, ConfigError, ConflictError

RECORD_BYTES = 1 << 14


@dataclass(frozen=True)
class CalibrationRequest:
    """Parameters of a search.

    `examples` by kind, `data` with their origin for the record, and the maximum number of
    candidates (None: the server's setting).
    """

    examples: Mapping[str, Any]
    data: Mapping[str, Any] | None = None
    seed: int = 0
    evaluations: int | None = None


async def start(
    tenancy: TenantContext,
    name: str,
    request: CalibrationRequest,
    *,
    publish: bool,
    expected: int | None,
    actor: str,
) -> Job:
    """Start a job that searches better coefficients for the published, or else newest, revision.

    Errors: ConfigError, NotFoundError, ConflictError, FrozenError.
    """
    params = await _params(tenancy, request, publish, actor)
    tenant = await changeable(tenancy, name, expected)
    revision = await _revision(tenancy, name, tenant.published)
    params |= {"revision": revision.number, "expected": tenant.published or 0}
    return await enqueue(tenancy, name, CALIBRATE, params, actor)


async def register(
    tenancy: TenantContext,
    name: str,
    request: CalibrationRequest,
    *,
    source: str | None,
    first: Change,
    limits: Mapping[str, int],
    publish: bool,
    actor: str,
) -> tuple[Tenant, Job]:
    """Register a tenant of this server's family and start the job that calibrates and onboards it.

    Idempotent: the same registration returns the same tenant and job.

    Errors: ConfigError, BoundsError (`first` gives coefficients too), RegistryError, ConflictError
    (no source, or the name is taken), FrozenError.
    """
    params = await _params(tenancy, request, publish, actor)
    params |= {"source": _searchable(source, first), "expected": 0}
    return await enroll(tenancy, name, CALIBRATE, params, source=source, limits=limits, actor=actor)


async def add_revision(
    tenancy: TenantContext,
    name: str,
    request: CalibrationRequest,
    *,
    source: str | None,
    first: Change,
    publish: bool,
    expected: int | None,
    actor: str,
) -> Job:
    """Start a job that calibrates new content for a tenant.

    Without a source, the source of its last revision is read again.

    Errors: ConfigError, BoundsError, NotFoundError, ConflictError, FrozenError.
    """
    params = await _params(tenancy, request, publish, actor)
    tenant = await changeable(tenancy, name, expected)
    where = _searchable(source or await last_source(tenancy, tenant), first)
    params |= {"source": where, "expected": tenant.published or 0}
    return await enqueue(tenancy, name, CALIBRATE, params, actor)


async def _params(
    tenancy: TenantContext, request: CalibrationRequest, publish: bool, actor: str
) -> dict[str, Any]:
    """Parameters that all calibration jobs share. Errors: ConfigError."""
    settings, header = tenancy.settings.calibration, tenancy.replica.header
    examples = read_examples(request.examples, settings)
    budget = settings.evaluations if request.evaluations is None else request.evaluations
    if budget < MIN_BUDGET:
        raise ConfigError(f"evaluations = {budget}, expected at least {MIN_BUDGET}")
    data = _data(request.data)
    space_of(header, (await aside(tenancy.registry.policies.get, header.digest)).floor)
    return {
        "data": data,
        "seed": request.seed,
        "evaluations": budget,
        "publish": publish,
        "actor": actor,
        "shots": {kind: digest_of_rows(rows) for kind, rows in examples.items()},
        PRIVATE: {"examples": {kind: list(request.examples.get(kind) or ()) for kind in KINDS}},
    }


def _searchable(source: str | None, first: Change) -> str:
    """Errors: BoundsError, ConflictError."""
    if first.form is not None:
        raise BoundsError(
            f"calibrate and {first.form} are given, expected one of them: calibrate finds the "
            "coefficients itself"
        )
    if source is None:
        raise ConflictError(
            "calibrate is given without a source; give the adapter whose coefficients are to be "
            "found"
        )
    return source


async def _revision(tenancy: TenantContext, name: str, published: int | None) -> Revision:
    if published is not None:
        return await aside(tenancy.registry.revisions.get, name, published)
    revisions = await aside(tenancy.registry.revisions.list, name)
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
            f"data: {size_bytes} bytes of JSON, expected at most {RECORD_BYTES}; it describes "
            "the origin of the examples and contains none"
        )
    return found
