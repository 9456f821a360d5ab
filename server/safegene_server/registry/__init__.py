"""Registry of families, tenants, revisions, keys, replicas, jobs and audit, in one database.

The only state that replicas share. Knows neither the engine nor HTTP nor tenants' files.
"""

from safegene_server.registry.history import History, Seen
from safegene_server.registry.records import (
    AuditEntry,
    AuditPage,
    Family,
    Identity,
    Job,
    Key,
    Lag,
    NewKey,
    Policy,
    Position,
    Replica,
    ReplicaReceipt,
    Revision,
    Rollout,
    RolloutStatus,
    Snapshot,
    Tenant,
    UsageCursor,
    UsagePage,
    UsageRow,
)
from safegene_server.registry.store import Registry
from safegene_server.registry.watch import watch

__all__ = [
    "AuditEntry",
    "AuditPage",
    "Family",
    "History",
    "Identity",
    "Job",
    "Key",
    "Lag",
    "NewKey",
    "Policy",
    "Position",
    "Registry",
    "Replica",
    "ReplicaReceipt",
    "Revision",
    "Rollout",
    "RolloutStatus",
    "Seen",
    "Snapshot",
    "Tenant",
    "UsageCursor",
    "UsagePage",
    "UsageRow",
    "watch",
]
