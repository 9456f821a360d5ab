"""The registry: families, tenants, revisions, keys, replicas, jobs and audit, in one database.

The only state that replicas share. Knows no engine, no HTTP and no files of tenants.
"""

from safegene_server.registry.records import (
    AuditEntry,
    AuditPage,
    Family,
    Job,
    Key,
    Lag,
    NewKey,
    Policy,
    Replica,
    ReplicaReceipt,
    Revision,
    Rollout,
    RolloutStatus,
    Snapshot,
    Tenant,
)
from safegene_server.registry.store import Registry
from safegene_server.registry.watch import watch

__all__ = [
    "AuditEntry",
    "AuditPage",
    "Family",
    "Job",
    "Key",
    "Lag",
    "NewKey",
    "Policy",
    "Registry",
    "Replica",
    "ReplicaReceipt",
    "Revision",
    "Rollout",
    "RolloutStatus",
    "Snapshot",
    "Tenant",
    "watch",
]
