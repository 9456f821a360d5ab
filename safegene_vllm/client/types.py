"""Response types of the API: plain dictionaries, typed for editors and type checkers.

Responses are passed on unchanged: a newer server may add fields. Timestamps are ISO 8601 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})


class Tenant(TypedDict):
    """A tenant; `published` is the number of the revision served as `served`, if any."""

    name: str
    family: str
    source: str | None
    state: Literal["active", "frozen", "retired"]
    limits: dict[str, int]
    published: int | None
    served: str | None
    created_at: str


class Revision(TypedDict):
    """An immutable revision of a tenant, named `tenant@N`, with a coefficient per layer."""

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
    """A change being applied by the replicas: `applied` of `live` have done so."""

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
    """A long-running job; `progress` runs from 0 to 1."""

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
    """An API key; `secret` is only in the response that creates or rotates it."""

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
    """A family: its layers with a vector, and the settings for all of its tenants."""

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
    """An entry of the audit log."""

    id: int
    at: str
    actor: str
    action: str
    target: str
    details: dict[str, Any]


class AuditPage(TypedDict):
    """Entries, newest first; `cursor` requests older ones, None if there are no more."""

    data: list[AuditEntry]
    cursor: int | str | None


class Whoami(TypedDict):
    """Name, scopes and tenants of the request's key."""

    name: str
    scopes: list[str]
    tenants: list[str]
    default_tenant: str | None
    base: bool
    expires_at: str | None


class Rate(TypedDict):
    """A rate among `n` prompts."""

    rate: float
    n: int


class ProbeResult(TypedDict):
    """Rates one replica measured on one revision's completions; `seconds` in the engine."""

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
    """A tenant's last probe (`outcome` None: none yet), and `result` of the last complete one."""

    tenant: str
    served: str
    outcome: Literal["ok", "failed", "skipped"] | None
    message: str
    result: ProbeResult | None


class Started(TypedDict):
    """A change that a `job` carries out."""

    tenant: Tenant
    job: Job


class Change(TypedDict):
    """The published revision, and its rollout to the other replicas, if any."""

    revision: Revision
    rollout: Rollout | None


class Retired(TypedDict):
    """A retired tenant; `rollout` as in Change."""

    tenant: Tenant
    rollout: Rollout | None


class Floored(TypedDict):
    """A family with its new floor; `rollout` is None if no tenant had to be raised."""

    family: Family
    rollout: Rollout | None


def change_body(
    *,
    profile: Mapping[str, Any] | None = None,
    coefficients: Sequence[float] | float | None = None,
    layers: Mapping[int, float] | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Build the part of a request body with the coefficients."""
    many = coefficients if isinstance(coefficients, float | int | None) else list(coefficients)
    named = None if layers is None else {str(layer): value for layer, value in layers.items()}
    return {"profile": profile, "coefficients": many, "layers": named, "scale": scale}
