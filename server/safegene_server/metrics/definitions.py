"""Metrics other than those of probes, on the default registry; see docs/reference/metrics.md.

Of several processes that share /metrics only one writes a gauge, whose newest value is shown.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from prometheus_client import Counter, Gauge, Histogram

OUTCOMES = ("ok", "client_error", "server_error", "cancelled")
REASONS = (
    "no_key",
    "unknown_key",
    "scope",
    "model",
    "body",
    "field",
    "concurrent",
    "requests_per_minute",
    "tokens_per_minute",
    "other",
)
RULE = "strings:opening"
"""Rule that judges completions in passing, as `safegene_vllm.evaluation` names it."""

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITL_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_APPLY_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_LOAD_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_JOB_S = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, multiprocess_mode="livemostrecent")


# -- traffic -------------------------------------------------------------------------------------

REQUESTS = Counter(
    "safegene_requests_total",
    "Requests for a completion, by outcome.",
    ("tenant", "outcome"),
)
REJECTED = Counter(
    "safegene_rejected_requests_total",
    "Requests that were rejected before the engine ran them, by reason.",
    ("tenant", "reason"),
)
PROMPT_TOKENS = Counter(
    "safegene_prompt_tokens_total", "Tokens of prompts of completed requests.", ("tenant",)
)
GENERATION_TOKENS = Counter(
    "safegene_generation_tokens_total", "Tokens of completions.", ("tenant",)
)
TIME_TO_FIRST_TOKEN = Histogram(
    "safegene_time_to_first_token_seconds",
    "Streams: from the request to the first chunk of its completion.",
    ("tenant",),
    buckets=_TTFT_S,
)
INTER_TOKEN_LATENCY = Histogram(
    "safegene_inter_token_latency_seconds",
    "Streams: between one chunk of the completion and the next.",
    ("tenant",),
    buckets=_ITL_S,
)
REQUEST_DURATION = Histogram(
    "safegene_request_duration_seconds",
    "From the request to the end of its response.",
    ("tenant",),
    buckets=_REQUEST_S,
)
JUDGED_COMPLETIONS = Counter(
    "safegene_judged_answers_total",
    "Completions that were checked for a refusal; each choice is one.",
    ("tenant", "rule"),
)
REFUSALS = Counter(
    "safegene_refusals_total",
    "Completions that are refusals by the named rule.",
    ("tenant", "rule"),
)
UNPROTECTED_REQUESTS = Counter(
    "safegene_unprotected_requests_total",
    "Requests that were served, to the end or not, without a profile.",
    ("tenant",),
)

# -- what is applied -----------------------------------------------------------------------------

REVISION_INFO = _gauge(
    "safegene_revision_info",
    "1 for the revision that a tenant's name leads to here.",
    "tenant",
    "revision",
    "family",
    "profile",
    "apply",
)
PUBLISHED_AT = _gauge(
    "safegene_revision_published_timestamp_seconds",
    "When the tenant's revision was published.",
    "tenant",
)
GAIN_NORM = _gauge(
    "safegene_gain_norm",
    "Euclidean norm of the coefficients that the ranks hold for a tenant; the minimum over ranks.",
    "tenant",
)
COEFFICIENT = _gauge(
    "safegene_coefficient",
    "Coefficients of a tenant over the layers that carry a vector.",
    "tenant",
    "stat",
)
ACTIVE_LAYERS = _gauge(
    "safegene_active_layers",
    "Layers whose coefficient is not zero, of those that carry a vector.",
    "tenant",
)
SITES = _gauge(
    "safegene_sites",
    "Target modules of the vector that a rank should apply and applies.",
    "rank",
    "state",
)
VECTOR_BYTES = _gauge("safegene_vector_bytes", "Device memory of the vector.", "rank")
ADAPTER_BYTES = _gauge(
    "safegene_adapter_bytes", "Memory of a rank's loaded adapters, each counted once.", "rank"
)
SLOTS = _gauge("safegene_slots", "LoRA slots on the device.", "state")
EVICTIONS = Counter(
    "safegene_slot_evictions_total", "Adapters that were evicted from their LoRA slot for another."
)
RECEIPT_AT = _gauge(
    "safegene_receipt_timestamp_seconds",
    "When all that a rank applies was last verified.",
    "rank",
)
APPLY_SECONDS = Histogram(
    "safegene_revision_apply_seconds",
    "From a change seen in the registry to the revision served here.",
    buckets=_APPLY_S,
)
LOAD_SECONDS = Histogram(
    "safegene_revision_load_seconds",
    "Loading of an adapter, until the receipts of all ranks have passed.",
    buckets=_LOAD_S,
)
UNPROTECTED_MODE = _gauge(
    "safegene_unprotected_mode",
    "1 where this server may serve requests without a vector in this way.",
    "mode",
)
BUILD_INFO = _gauge(
    "safegene_build_info",
    "1, labeled with the running versions.",
    "version",
    "vllm_version",
    "apply",
    "family",
)

# -- registry, replica, jobs ---------------------------------------------------------------------

REVISIONS = _gauge("safegene_revisions", "Revisions in the registry by state.", "state")
REGISTRY_VERSION = _gauge(
    "safegene_registry_version", "The registry's version as known and as applied here.", "state"
)
REPLICAS = _gauge(
    "safegene_replicas", "Replicas with a recent heartbeat, up to date or lagging.", "state"
)
JOBS = _gauge("safegene_jobs", "Jobs in the registry.", "kind", "state")
JOB_SECONDS = Histogram("safegene_job_seconds", "Jobs that ended here.", ("kind",), buckets=_JOB_S)


class ReplicaGauges(NamedTuple):
    """Gauges and counter of a replica, without labels."""

    registry_up: Gauge
    lag: Gauge
    ready: Gauge
    faults: Gauge
    losses: Counter


@cache
def replica_gauges() -> ReplicaGauges:
    """Make the gauges, in a server with a registry only.

    A gauge without labels starts at 0, which elsewhere would show a registry that is down.
    """
    return ReplicaGauges(
        _gauge("safegene_registry_up", "1 if the registry answered its last query."),
        _gauge(
            "safegene_registry_lag_seconds",
            "How long this replica has known a version that it does not serve; 0 if up to date.",
        ),
        _gauge("safegene_replica_ready", "1 if everything published is served here."),
        _gauge("safegene_replica_faults", "Number of reasons why the replica is not ready."),
        Counter(
            "safegene_registry_losses_total",
            "Times that the registry had lost changes that this replica had seen.",
        ),
    )
