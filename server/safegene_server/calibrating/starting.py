"""The beginning of a calibration: everything that can be refused before anybody waits for it.

The examples lie in the job's private parameters, which the registry forgets when the job ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safegene_server.calibrating.job import CALIBRATE
from safegene_server.calibrating.search import LEAST_BUDGET
from safegene_server.calibrating.shots import KINDS, read_shots
from safegene_server.registry import Job, Revision
from safegene_server.registry.jobs import PRIVATE
from safegene_server.registry.revisions import check_expected
from safegene_server.tenants import Tenancy
from safegene_server.tenants.lifecycle import ours, refuse_unchangeable
from safegene_server.tenants.tenancy import aside
from safegene_vllm.errors import ConfigError, ConflictError

RECORD_BYTES = 1 << 14


async def start(
    tenancy: Tenancy,
    name: str,
    *,
    examples: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    seed: int,
    evaluations: int | None,
    publish: bool,
    expected: int | None,
    actor: str,
) -> Job:
    """The job that looks for better coefficients of what the tenant serves, or of its newest
    revision while it serves nothing. `data` tells the record where the examples are from.

    Errors: ConfigError, UnknownError, ConflictError, FrozenError.
    """
    settings = tenancy.settings.calibration
    read_shots(examples, settings)
    budget = settings.evaluations if evaluations is None else evaluations
    if budget < LEAST_BUDGET:
        raise ConfigError(f"evaluations = {budget}, expected at least {LEAST_BUDGET}")
    told = _data(data)
    tenant = await ours(tenancy, name)
    check_expected(tenant, expected)
    await refuse_unchangeable(tenancy, tenant)
    revision = await _revision(tenancy, name, tenant.published)
    params = {
        "revision": revision.number,
        "data": told,
        "seed": seed,
        "evaluations": budget,
        "publish": publish,
        "expected": tenant.published or 0,
        "actor": actor,
        PRIVATE: {"examples": {kind: list(examples.get(kind) or ()) for kind in KINDS}},
    }
    job = await aside(tenancy.registry.enqueue, CALIBRATE, name, actor=actor, params=params)
    tenancy.jobs.wake()
    return job


async def _revision(tenancy: Tenancy, name: str, published: int | None) -> Revision:
    if published is not None:
        return await aside(tenancy.registry.revision, name, published)
    revisions = await aside(tenancy.registry.revisions, name)
    if not revisions:
        raise ConflictError(
            f"tenant {name!r} has no revision whose coefficients could be calibrated; add one, "
            "such as with coefficients 0 and publish false"
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
