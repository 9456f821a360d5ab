"""Records of the registry: frozen dataclasses, timestamps in UTC.

A record is a copy of what was true when it was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Row

from safegene_server.registry.validation import served_name
from safegene_vllm.client.schemas import (
    JobState,
    RevisionKind,
    RevisionState,
    RolloutKind,
    TenantState,
)
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


@dataclass(frozen=True)
class Family:
    """A registered family; `source` is the path or URL that it was registered with."""

    digest: str
    name: str
    header: FamilyHeader
    source: str | None
    created_at: datetime


@dataclass(frozen=True)
class Tenant:
    """A tenant; `published` is the revision number that its alias names, None for none."""

    id: int
    name: str
    family: str
    source: str | None
    state: TenantState
    limits: Mapping[str, int]
    published: int | None
    created_at: datetime

    @property
    def served(self) -> str | None:
        return None if self.published is None else served_name(self.name, self.published)


@dataclass(frozen=True)
class Identity:
    """Identity of a revision: its id, its name and the digests of its content.

    A restored registry may assign an id or a name to other content, so neither identifies a
    revision.
    """

    id: int
    name: str
    family: str
    adapter: str | None
    profile: str


@dataclass(frozen=True)
class Revision:
    """Immutable content of a tenant, with its state; `id` is its lora_int_id.

    `source` is where its adapter can be fetched, None for a profile on the base.
    """

    id: int
    tenant: str
    number: int
    kind: RevisionKind
    adapter_digest: str | None
    profile: Profile
    source: str | None
    state: RevisionState
    reasons: tuple[str, ...]
    gate: Mapping[str, Any]
    created_at: datetime
    created_by: str

    @property
    def served_name(self) -> str:
        return served_name(self.tenant, self.number)

    @cached_property
    def identity(self) -> Identity:
        """Identity by which a loaded revision is recognized."""
        return Identity(
            id=self.id,
            name=self.served_name,
            family=self.profile.family,
            adapter=self.adapter_digest,
            profile=self.profile.digest,
        )


@dataclass(frozen=True)
class Policy:
    """Policy of a family: the least coefficient per layer, and whether the family is frozen."""

    family: str
    floor: Mapping[int, float]
    frozen: bool


@dataclass(frozen=True)
class Key:
    """A key without its secret; `hash` is the SHA-256 of the secret in hexadecimal digits."""

    name: str
    hash: str = field(repr=False)
    prefix: str
    scopes: tuple[str, ...]
    tenants: tuple[str, ...]
    default_tenant: str | None
    expires_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime


@dataclass(frozen=True)
class NewKey:
    """A key with its secret, which is not stored."""

    key: Key
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Replica:
    """A server process; it is alive while its last heartbeat is recent."""

    id: str
    host: str
    pid: int
    started_at: datetime
    seen_at: datetime
    applied_version: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class ReplicaReceipt:
    """Receipt of a revision from a replica; `ok` if every rank applies it as its files say."""

    replica: str
    revision: int
    receipt: Mapping[str, Any]
    ok: bool
    at: datetime


@dataclass(frozen=True)
class Rollout:
    """A change that replicas follow; done on a replica that has applied `version`."""

    id: int
    kind: RolloutKind
    tenants: tuple[str, ...]
    revisions: tuple[int, ...]
    version: int
    created_at: datetime
    created_by: str


@dataclass(frozen=True)
class Lag:
    """A live replica that has not applied a rollout, with the reason."""

    replica: Replica
    reason: str


@dataclass(frozen=True)
class RolloutStatus:
    """Progress of a rollout: `applied` of `live` replicas follow it, `lagging` are the others.

    `revisions` are those of the rollout in their current state.
    """

    rollout: Rollout
    revisions: tuple[Revision, ...]
    applied: int
    live: int
    lagging: tuple[Lag, ...]

    @property
    def done(self) -> bool:
        return not self.lagging and self.live > 0


@dataclass(frozen=True)
class Job:
    """A long task. Its owner holds it until `lease_until`; then another may claim it.

    `attempts` counts its starts, without those that ended in a release.
    """

    id: int
    kind: str
    tenant: str
    revision: int | None
    params: Mapping[str, Any]
    state: JobState
    progress: float
    message: str
    result: Mapping[str, Any] | None
    attempts: int
    owner: str | None
    lease_until: datetime | None
    cancel_requested: bool
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class AuditEntry:
    """Entry of the audit log."""

    id: int
    at: datetime
    actor: str
    action: str
    target: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class AuditPage:
    """Entries, newest first; `cursor` (None: no more) continues with older ones."""

    entries: tuple[AuditEntry, ...]
    cursor: int | None


@dataclass(frozen=True)
class UsageRow:
    """Requests and tokens of one tenant by one key on one day in UTC.

    `tenant` is the base model's served name for requests to the base model itself.
    """

    day: date
    tenant: str
    key: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


UsageCursor = tuple[date, str, str]
"""Day, tenant and key of the last row of a page."""


@dataclass(frozen=True)
class UsagePage:
    """Rows, newest day first; `cursor` (None: no more) continues after the last one."""

    rows: tuple[UsageRow, ...]
    cursor: UsageCursor | None


@dataclass(frozen=True)
class Position:
    """Position of a registry when it was read: its version and its newest audit entry.

    `entry` is the entry's id, timestamp, actor, action and target; None without entries.
    """

    version: int
    entry: tuple[int, datetime, str, str, str] | None


@dataclass(frozen=True)
class Snapshot:
    """Everything that replicas follow, as of one version; equal content is an equal snapshot.

    `tenants` are those not retired, `revisions` the published ones, `previous` those that a
    rollback would publish (to be loaded ahead, but not served), `keys` those not revoked. `lost`:
    the registry no longer contains the position that the reader has seen.
    """

    version: int
    tenants: tuple[Tenant, ...]
    revisions: tuple[Revision, ...]
    previous: tuple[Revision, ...]
    keys: tuple[Key, ...]
    position: Position = field(compare=False)
    lost: bool = field(compare=False)


def from_row(cls: type[R], row: Row[Any], **values: Any) -> R:
    """Make a record of the row's columns with the names of its fields, or of `values`."""
    columns = row._mapping
    for name in {f.name for f in fields(cls)} - values.keys():
        value = columns[name]
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
