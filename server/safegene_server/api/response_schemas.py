"""What the routes answer with, as pydantic models, and how they are made from the records.

The names of fields are a promise to clients. No path of the local store is in any answer.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from safegene_server import registry as records
from safegene_server.monitoring.probes import ProbeStatus
from safegene_server.registry.records import JobState, RevisionKind, RevisionState, TenantState

_T = TypeVar("_T")


class Fault(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """The body of every refusal."""

    error: Fault


class Page(BaseModel, Generic[_T]):
    """A list; `cursor` (null: no more) asks for what follows."""

    data: list[_T]
    cursor: int | None = None


class Tenant(BaseModel):
    """A tenant; `published` is the number of the revision that its name leads to."""

    name: str = Field(examples=["acme/support"])
    family: str = Field(description="digest of its family")
    source: str | None = Field(description="where its adapter comes from; null: a profile only")
    state: TenantState
    limits: dict[str, int] = Field(examples=[{"concurrent": 8, "tokens_per_minute": 60000}])
    published: int | None = Field(examples=[3])
    served: str | None = Field(description="the model that answers", examples=["acme/support@3"])
    created_at: datetime


class Revision(BaseModel):
    """One immutable content of a tenant, and how far it has come."""

    name: str = Field(examples=["acme/support@3"])
    tenant: str
    number: int
    kind: RevisionKind
    adapter_digest: str | None
    profile_digest: str
    coefficients: list[float] = Field(description="one per layer of the base")
    state: RevisionState
    reasons: list[str] = Field(description="why it failed")
    gate: dict[str, Any] = Field(description="what the gate found")
    created_at: datetime
    created_by: str


class Lagging(BaseModel):
    """A live replica that does not follow a rollout yet."""

    replica: str
    reason: str


class Rollout(BaseModel):
    """A change that replicas follow: `applied` of `live` do."""

    id: int
    kind: Literal["publish", "rollback", "retire", "floor"]
    tenants: list[str]
    revisions: list[str] = Field(examples=[["acme/support@3"]])
    applied: int
    live: int
    done: bool
    lagging: list[Lagging]
    created_at: datetime
    created_by: str


class Job(BaseModel):
    """A long step. `progress` runs from 0 to 1; `result` says what came of it."""

    id: int
    kind: str = Field(examples=["onboard"])
    tenant: str
    revision: str | None = Field(examples=["acme/support@3"])
    state: JobState
    progress: float
    message: str
    result: dict[str, Any] | None
    attempts: int
    created_at: datetime
    updated_at: datetime


class Key(BaseModel):
    """An API key without its secret; `prefix` is how the secret begins."""

    name: str
    prefix: str
    scopes: list[str]
    tenants: list[str]
    default_tenant: str | None
    expires_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime


class NewKey(Key):
    """A key and its secret, which is told this once."""

    secret: str


class Family(BaseModel):
    """A family: which layers carry a vector, and what holds for all of its tenants."""

    digest: str
    name: str
    source: str | None = Field(
        description="where the server has it from; null for keys for some tenants"
    )
    num_layers: int
    layers: list[int] = Field(description="layers that carry a vector")
    bounds: tuple[float, float] = Field(description="least and largest coefficient")
    floor: dict[str, float] = Field(description="layer to least coefficient")
    frozen: bool
    created_at: datetime


class Replica(BaseModel):
    """One live server process, and what it has applied."""

    id: str
    host: str
    pid: int
    started_at: datetime
    seen_at: datetime
    applied_version: int
    faults: list[str]


class AuditEntry(BaseModel):
    """Who did what to what, when."""

    id: int
    at: datetime
    actor: str
    action: str = Field(examples=["tenant.publish"])
    target: str
    details: dict[str, Any]


class Whoami(BaseModel):
    """What the server knows of the key that asks."""

    name: str
    scopes: list[str]
    tenants: list[str]
    default_tenant: str | None
    base: bool = Field(description="whether it may ask the base model itself")
    expires_at: datetime | None


class Rate(BaseModel):
    """A share of `n`."""

    rate: float
    n: int


class ProbeResult(BaseModel):
    """What was counted of one probe of one revision, by the engine of one replica."""

    revision: str = Field(examples=["acme/support@3"])
    replica: str
    at: datetime
    seconds: float = Field(description="in the engine, pauses not counted")
    attack_success: Rate = Field(description="harmful questions that were not refused")
    over_refusal: Rate = Field(description="lookalike and benign questions that were refused")
    refused: dict[str, Rate] = Field(description="by kind: harmful, lookalike, benign")
    coherent: Rate
    judges: list[str] = Field(examples=[["strings:opening", "coherence"]])
    max_tokens: int
    prompts: str = Field(description="digest of the questions")


class Probe(BaseModel):
    """How it stands with a tenant on the replica that answers."""

    tenant: str
    served: str = Field(description="what answers for it here", examples=["acme/support@3"])
    outcome: Literal["ok", "failed", "skipped"] | None = Field(
        description="of the last probe of this revision; null: none yet"
    )
    message: str = Field(description="why it did not come to its end")
    result: ProbeResult | None = Field(description="of the last probe that did")


class Onboarding(BaseModel):
    """A tenant, and the job that brings its new content into service."""

    tenant: Tenant
    job: Job


class Switched(BaseModel):
    """What a tenant serves now. `rollout` is null where nothing had to change."""

    revision: Revision
    rollout: Rollout | None


class Retired(BaseModel):
    tenant: Tenant
    rollout: Rollout | None


class Floored(BaseModel):
    """`rollout` is null where no tenant had to be raised."""

    family: Family
    rollout: Rollout | None


def tenant(found: records.Tenant) -> Tenant:
    return Tenant(
        name=found.name,
        family=found.family,
        source=found.source,
        state=found.state,
        limits=dict(found.limits),
        published=found.published,
        served=None if found.published is None else f"{found.name}@{found.published}",
        created_at=found.created_at,
    )


def revision(found: records.Revision) -> Revision:
    return Revision(
        name=found.served_name,
        tenant=found.tenant,
        number=found.number,
        kind=found.kind,
        adapter_digest=found.adapter_digest,
        profile_digest=found.profile.digest,
        coefficients=list(found.profile.coefficients),
        state=found.state,
        reasons=list(found.reasons),
        gate=dict(found.gate),
        created_at=found.created_at,
        created_by=found.created_by,
    )


def job(found: records.Job) -> Job:
    result = None if found.result is None else dict(found.result)
    return Job(
        id=found.id,
        kind=found.kind,
        tenant=found.tenant,
        revision=(result or {}).get("revision"),
        state=found.state,
        progress=found.progress,
        message=found.message,
        result=result,
        attempts=found.attempts,
        created_at=found.created_at,
        updated_at=found.updated_at,
    )


def probe(found: ProbeStatus) -> Probe:
    record = None if found.result is None else found.result.record()
    return Probe(
        tenant=found.tenant,
        served=found.served,
        outcome=found.outcome,
        message=found.message,
        result=None if record is None else ProbeResult(**record),
    )


def key(found: records.Key) -> Key:
    return Key(**_key(found))


def new_key(found: records.NewKey) -> NewKey:
    return NewKey(**_key(found.key), secret=found.secret)


def _key(found: records.Key) -> dict[str, Any]:
    return {
        "name": found.name,
        "prefix": found.prefix,
        "scopes": list(found.scopes),
        "tenants": list(found.tenants),
        "default_tenant": found.default_tenant,
        "expires_at": found.expires_at,
        "revoked_at": found.revoked_at,
        "created_at": found.created_at,
    }


def family(found: records.Family, policy: records.Policy) -> Family:
    return Family(
        digest=found.digest,
        name=found.name,
        source=found.source,
        num_layers=found.header.num_layers,
        layers=[entry.layer for entry in found.header.layers],
        bounds=found.header.bounds,
        floor={str(layer): least for layer, least in policy.floor.items()},
        frozen=policy.frozen,
        created_at=found.created_at,
    )


def replica(found: records.Replica) -> Replica:
    return Replica(
        id=found.id,
        host=found.host,
        pid=found.pid,
        started_at=found.started_at,
        seen_at=found.seen_at,
        applied_version=found.applied_version,
        faults=list(found.faults),
    )


def audit_entry(found: records.AuditEntry) -> AuditEntry:
    return AuditEntry(
        id=found.id,
        at=found.at,
        actor=found.actor,
        action=found.action,
        target=found.target,
        details=dict(found.details),
    )
