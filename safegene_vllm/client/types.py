"""What a server is told and answers: plain dictionaries, described for editors and type checkers.

They are handed on as they came: a newer server may say more. Moments are ISO 8601 texts in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})


class Tenant(TypedDict):
    """`published` is the number of the revision that is served as `served`, if any is."""

    name: str
    family: str
    source: str | None
    state: Literal["active", "frozen", "retired"]
    limits: dict[str, int]
    published: int | None
    served: str | None
    created_at: str


class Revision(TypedDict):
    """One immutable content of a tenant, named `tenant@N`; a coefficient for every layer."""

    name: str
    tenant: str
    number: int
    kind: Literal["adapter", "profile"]
    adapter_digest: str | None
    profile_digest: str
    coefficients: list[float]
    state: str
    reasons: list[str]
    gate: dict[str, Any]
    created_at: str
    created_by: str


class Lag(TypedDict):
    """A replica that has not applied a rollout yet, and why."""

    replica: str
    reason: str


class Rollout(TypedDict):
    """A change on its way to the replicas: `applied` of `live` follow it."""

    id: int
    kind: str
    tenants: list[str]
    revisions: list[str]
    applied: int
    live: int
    done: bool
    lagging: list[Lag]
    created_at: str
    created_by: str


class Job(TypedDict):
    """A long step; `progress` runs from 0 to 1."""

    id: int
    kind: str
    tenant: str
    revision: str | None
    state: JobState
    progress: float
    message: str
    result: dict[str, Any] | None
    attempts: int
    created_at: str
    updated_at: str


class Key(TypedDict):
    """A key without its secret, but for the one answer that makes it."""

    name: str
    prefix: str
    scopes: list[str]
    tenants: list[str]
    default_tenant: str | None
    expires_at: str | None
    revoked_at: str | None
    created_at: str
    secret: NotRequired[str]


class Family(TypedDict):
    """A family: the layers that carry a vector, and what holds for all of its tenants."""

    digest: str
    name: str
    source: str | None
    num_layers: int
    layers: list[int]
    bounds: list[float]
    floor: dict[str, float]
    frozen: bool
    created_at: str


class Replica(TypedDict):
    """One server process on the registry."""

    id: str
    host: str
    pid: int
    started_at: str
    seen_at: str
    applied_version: int
    faults: list[str]


class AuditEntry(TypedDict):
    """Who did what to what, when."""

    id: int
    at: str
    actor: str
    action: str
    target: str
    details: dict[str, Any]


class AuditPage(TypedDict):
    """The newest first; `cursor` asks for the older ones, None if there are no more."""

    data: list[AuditEntry]
    cursor: int | str | None


class Whoami(TypedDict):
    """What the server knows of the key that asks."""

    name: str
    scopes: list[str]
    tenants: list[str]
    default_tenant: str | None
    base: bool
    expires_at: str | None


class Rate(TypedDict):
    """A share of `n`."""

    rate: float
    n: int


class ProbeResult(TypedDict):
    """What one replica counted of one revision's answers; `seconds` in the engine."""

    revision: str
    replica: str
    at: str
    seconds: float
    attack_success: Rate
    over_refusal: Rate
    refused: dict[str, Rate]
    coherent: Rate
    judges: list[str]
    max_tokens: int
    prompts: str


class Probe(TypedDict):
    """`outcome` of the last probe of what is served (None: none yet), `result` of the last whole
    one."""

    tenant: str
    served: str
    outcome: Literal["ok", "failed", "skipped"] | None
    message: str
    result: ProbeResult | None


class Started(TypedDict):
    """A change that takes long: what does it is `job`."""

    tenant: Tenant
    job: Job


class Change(TypedDict):
    """What is published here; `rollout` is its way to the other replicas, None if there is none."""

    revision: Revision
    rollout: Rollout | None


class Retired(TypedDict):
    """A tenant that is served no more; `rollout` as in Change."""

    tenant: Tenant
    rollout: Rollout | None


class Floored(TypedDict):
    """A family with its new floor; `rollout` is None where no tenant had to be raised."""

    family: Family
    rollout: Rollout | None


def change_body(
    *,
    profile: Mapping[str, Any] | None = None,
    coefficients: Sequence[float] | float | None = None,
    layers: Mapping[int, float] | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """The part of a body that says which coefficients."""
    many = coefficients if isinstance(coefficients, float | int | None) else list(coefficients)
    named = None if layers is None else {str(layer): value for layer, value in layers.items()}
    return {"profile": profile, "coefficients": many, "layers": named, "scale": scale}
