"""What the registry answers with: frozen dataclasses, moments in UTC.

For everybody who asks the registry. A record is what was true when it was read; changing one
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

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


@dataclass(frozen=True)
class Family:
    """A family as it was registered; `source` is what the owner gave, a path or a URL."""

    digest: str
    name: str
    header: FamilyHeader
    source: str | None
    created_at: datetime


@dataclass(frozen=True)
class Tenant:
    """A tenant; `published` is the number its alias leads to, None while nothing is published."""

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
    """One revision: the registry's id and name for it, and the digests of its content.

    A registry that was restored may give an id or a name to other content, so neither is enough to
    recognize a revision.
    """

    id: int
    name: str
    family: str
    adapter: str | None
    profile: str


@dataclass(frozen=True)
class Revision:
    """One immutable content of a tenant; `id` is its lora_int_id. State and gate may change.

    `source` is where its adapter can be fetched again, None for a profile on the base.
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
        """Key by which the revision is recognized wherever it may be loaded already."""
        return Identity(
            id=self.id,
            name=self.served_name,
            family=self.profile.family,
            adapter=self.adapter_digest,
            profile=self.profile.digest,
        )


@dataclass(frozen=True)
class Policy:
    """What holds for a whole family: the least coefficient per layer, and whether it is frozen."""

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
    """A key and its secret, which is told this once."""

    key: Key
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Replica:
    """One server process; it is alive while it was seen lately."""

    id: str
    host: str
    pid: int
    started_at: datetime
    seen_at: datetime
    applied_version: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class ReplicaReceipt:
    """What one replica reports of one revision; `ok` says that every rank keeps the promise."""

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
    """A live replica that has not applied a rollout, and why."""

    replica: Replica
    reason: str


@dataclass(frozen=True)
class RolloutStatus:
    """`applied` of `live` replicas follow the rollout; `lagging` are the others. `revisions` are
    those it led to, as they are now."""

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
    """A long step. Its owner holds it until `lease_until`; then another may claim it.

    `attempts`: how often it was begun, without those that were released in good order.
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
    """Who did what to what, when."""

    id: int
    at: datetime
    actor: str
    action: str
    target: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class AuditPage:
    """Entries, the newest first; `cursor` (None: no more) continues with older ones."""

    entries: tuple[AuditEntry, ...]
    cursor: int | None


@dataclass(frozen=True)
class Position:
    """Position of a registry when it was read: its version, and its newest audit entry by id,
    timestamp, actor, action and target (None: there was none).
    """

    version: int
    entry: tuple[int, datetime, str, str, str] | None


@dataclass(frozen=True)
class Snapshot:
    """What replicas follow, all of it as of one version; equal content is an equal snapshot.

    `tenants` are those not retired, `revisions` the published ones, `previous` what a rollback
    would publish (worth keeping warm, not to be offered), `keys` those not revoked. `lost`: the
    registry no longer has what the reader had seen of it.
    """

    version: int
    tenants: tuple[Tenant, ...]
    revisions: tuple[Revision, ...]
    previous: tuple[Revision, ...]
    keys: tuple[Key, ...]
    position: Position = field(compare=False)
    lost: bool = field(compare=False)
