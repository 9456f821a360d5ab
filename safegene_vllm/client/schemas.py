"""Schemas of the objects of a server's API, shared by the server, its OpenAPI and the client.

The server makes them from the registry's records (`from_attributes`), the client from responses,
whose additional fields (of a newer server) it keeps. Names of fields are a public contract.
Timestamps are in UTC.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from datetime import date, datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field

TenantState = Literal["active", "frozen", "retired"]
RevisionKind = Literal["adapter", "profile"]
RevisionState = Literal[
    "registered", "checking", "failed", "ready", "published", "superseded", "retired"
]
RolloutKind = Literal["publish", "rollback", "retire", "floor"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})

_T = TypeVar("_T")


class Schema(BaseModel):
    """An object of the API. `job["state"]` reads the same field as `job.state`."""

    model_config = ConfigDict(
        from_attributes=True, json_schema_serialization_defaults_required=True
    )

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields and name not in (self.model_extra or {}):
            raise KeyError(name)
        return getattr(self, name)


def _from(*path: str) -> AliasChoices:
    """Read a field under its own name, the last of `path`'s names joined by _, or by the path."""
    return AliasChoices("_".join(path), AliasPath(*path))


class Page(Schema, Generic[_T]):
    """Page of a list; `cursor` requests the next page, null at the end."""

    data: list[_T]
    cursor: int | None = None


class Tenant(Schema):
    """A tenant; `published` is the number of the revision that its name leads to."""

    name: str = Field(examples=["acme/support"])
    family: str = Field(description="digest of its family")
    source: str | None = Field(description="source of its adapter; null: a profile only")
    state: TenantState
    limits: dict[str, int] = Field(examples=[{"concurrent": 8, "tokens_per_minute": 60000}])
    published: int | None = Field(examples=[3])
    served: str | None = Field(
        description="the model that serves its requests", examples=["acme/support@3"]
    )
    failure: str | None = Field(
        None, description="why it serves nothing, if its last job failed or was cancelled"
    )
    created_at: datetime


class Revision(Schema):
    """One immutable content of a tenant, and its state."""

    name: str = Field(
        validation_alias=AliasChoices("served_name", "name"), examples=["acme/support@3"]
    )
    tenant: str
    number: int
    kind: RevisionKind
    adapter_digest: str | None
    profile_digest: str = Field(validation_alias=_from("profile", "digest"))
    coefficients: list[float] = Field(
        validation_alias=AliasChoices("coefficients", AliasPath("profile", "coefficients")),
        description="one per layer of the base",
    )
    state: RevisionState
    reasons: list[str] = Field(description="why it failed")
    gate: dict[str, Any] = Field(description="result of the smoke test")
    created_at: datetime
    created_by: str


class Lagging(Schema):
    """A live replica that does not follow a rollout yet."""

    replica: str
    reason: str


class Rollout(Schema):
    """A change that replicas follow: `applied` of `live` do."""

    id: int
    kind: RolloutKind
    tenants: list[str]
    revisions: list[str] = Field(examples=[["acme/support@3"]])
    applied: int
    live: int
    done: bool
    lagging: list[Lagging]
    created_at: datetime
    created_by: str


class Job(Schema):
    """A long-running step. `progress` runs from 0 to 1; `result` is set once it has ended."""

    id: int
    kind: str = Field(examples=["onboard"])
    tenant: str
    revision: str | None = Field(
        None, validation_alias=AliasPath("result", "revision"), examples=["acme/support@3"]
    )
    state: JobState
    progress: float
    message: str
    result: dict[str, Any] | None
    attempts: int
    created_at: datetime
    updated_at: datetime


class Key(Schema):
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
    """A key and its secret, which is shown this once."""

    secret: str


class Family(Schema):
    """A family: the layers that carry a vector, and the policy of all of its tenants."""

    digest: str
    name: str
    source: str | None = Field(
        description="where the server reads it from; null for keys for some tenants"
    )
    num_layers: int
    layers: list[int] = Field(description="layers that carry a vector")
    bounds: tuple[float, float] = Field(description="minimum and maximum coefficient")
    floor: dict[str, float] = Field(description="layer to minimum coefficient")
    frozen: bool
    created_at: datetime


class Replica(Schema):
    """One live server process, and the version it has applied."""

    id: str
    host: str
    pid: int
    started_at: datetime
    seen_at: datetime
    applied_version: int
    faults: list[str]


class AuditEntry(Schema):
    """An action with its actor, target and time."""

    id: int
    at: datetime
    actor: str
    action: str = Field(examples=["tenant.publish"])
    target: str
    details: dict[str, Any]


class Whoami(Schema):
    """The request's own key, as the server knows it."""

    name: str
    scopes: list[str]
    tenants: list[str]
    default_tenant: str | None
    base: bool = Field(description="whether it may use the base model itself")
    expires_at: datetime | None


class Rate(Schema):
    """A share of `n`."""

    rate: float
    n: int


class ProbeResult(Schema):
    """Counts of one probe of one revision, by the engine of one replica."""

    revision: str = Field(examples=["acme/support@3"])
    replica: str
    at: datetime
    seconds: float = Field(description="in the engine, pauses not counted")
    attack_success: Rate = Field(description="harmful prompts that were not refused")
    over_refusal: Rate = Field(description="lookalike and benign prompts that were refused")
    refused: dict[str, Rate] = Field(description="by kind: harmful, lookalike, benign")
    coherent: Rate
    judges: list[str] = Field(examples=[["strings:opening", "coherence"]])
    max_tokens: int
    prompts: str = Field(description="digest of the prompts")


class Probe(Schema):
    """Probes of a tenant on the replica that responds."""

    tenant: str
    served: str = Field(
        description="the model that serves its requests here", examples=["acme/support@3"]
    )
    outcome: Literal["ok", "failed", "skipped"] | None = Field(
        description="of the last probe of this revision; null: none yet"
    )
    message: str = Field(description="why it did not complete")
    result: ProbeResult | None = Field(description="of the last complete probe")


class Onboarding(Schema):
    """A tenant, and the job that publishes its new content."""

    tenant: Tenant
    job: Job


class Switched(Schema):
    """The revision a tenant serves now. `rollout` is null where nothing had to change."""

    revision: Revision
    rollout: Rollout | None


class Retired(Schema):
    """A retired tenant; `rollout` as in Switched."""

    tenant: Tenant
    rollout: Rollout | None


class Floored(Schema):
    """A family with its new floor; `rollout` is null where no tenant had to be raised."""

    family: Family
    rollout: Rollout | None


class Usage(Schema):
    """Requests and tokens of one tenant by one key on one day."""

    day: date = Field(description="in UTC", examples=["2031-05-01"])
    tenant: str = Field(
        description="a base model's name for the base itself", examples=["acme/support"]
    )
    key: str = Field(description="name of the key", examples=["acme-app"])
    requests: int = Field(description="admitted, those that failed later included")
    prompt_tokens: int
    completion_tokens: int


class UsagePage(Schema):
    """Page of usage; `cursor` requests the next page, null at the end."""

    data: list[Usage]
    cursor: str | None = None


def usage_csv(rows: Iterable[Usage], *, header: bool = True) -> str:
    """Format usage as CSV (RFC 4180), a row per day, tenant and key.

    A name that a spreadsheet would read as a formula begins with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(Usage.model_fields)
    for row in rows:
        names = (
            f"'{n}" if n.startswith(("=", "+", "-", "@")) else n for n in (row.tenant, row.key)
        )
        counts = (row.requests, row.prompt_tokens, row.completion_tokens)
        writer.writerow((row.day.isoformat(), *names, *counts))
    return text.getvalue()
