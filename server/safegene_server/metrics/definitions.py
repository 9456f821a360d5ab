"""Every metric of this project that is not a probe's: one object each, on the default registry.

Made once per process, when this module is first imported. Gauges keep the newest value where
several processes share /metrics, and only one of them writes them.
docs/reference/metrics.md explains all.
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
"""The one rule by which answers are judged in passing, as `safegene_vllm.evaluation` names it."""

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITL_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_APPLY_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_LOAD_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_JOB_S = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(name, meaning, labels, multiprocess_mode="livemostrecent")


# -- traffic -------------------------------------------------------------------------------------

REQUESTS = Counter(
    "safegene_requests_total",
    "Requests for an answer, by how they ended.",
    ("tenant", "outcome"),
)
REJECTED = Counter(
    "safegene_rejected_requests_total",
    "Requests that were refused before the engine ran them, by reason.",
    ("tenant", "reason"),
)
PROMPT_TOKENS = Counter(
    "safegene_prompt_tokens_total", "Tokens of prompts that were answered.", ("tenant",)
)
GENERATION_TOKENS = Counter("safegene_generation_tokens_total", "Tokens of answers.", ("tenant",))
TIME_TO_FIRST_TOKEN = Histogram(
    "safegene_time_to_first_token_seconds",
    "Streams: from the request to the first piece of its answer.",
    ("tenant",),
    buckets=_TTFT_S,
)
INTER_TOKEN_LATENCY = Histogram(
    "safegene_inter_token_latency_seconds",
    "Streams: between one piece of the answer and the next.",
    ("tenant",),
    buckets=_ITL_S,
)
REQUEST_DURATION = Histogram(
    "safegene_request_duration_seconds",
    "From the request to the end of its answer.",
    ("tenant",),
    buckets=_REQUEST_S,
)
JUDGED_ANSWERS = Counter(
    "safegene_judged_answers_total",
    "Answers in which a refusal was looked for; each choice is one.",
    ("tenant", "rule"),
)
REFUSALS = Counter(
    "safegene_refusals_total",
    "Answers that are refusals by the rule that is named.",
    ("tenant", "rule"),
)
UNPROTECTED_REQUESTS = Counter(
    "safegene_unprotected_requests_total",
    "Requests that were answered, to the end or not, by something that has no profile.",
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
    "Since when the tenant's name leads to its revision.",
    "tenant",
)
GAIN_NORM = _gauge(
    "safegene_gain_norm",
    "Euclidean norm of the coefficients that the ranks hold for a tenant; the least of them.",
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
    "safegene_sites", "Sites of the vector that a rank should carry and carries.", "rank", "state"
)
VECTOR_BYTES = _gauge("safegene_vector_bytes", "What the vector takes on the device.", "rank")
ADAPTER_BYTES = _gauge(
    "safegene_adapter_bytes", "What a rank's loaded adapters take, each of them once.", "rank"
)
SLOTS = _gauge("safegene_slots", "Adapter slots on the device.", "state")
EVICTIONS = Counter(
    "safegene_slot_evictions_total", "Adapters that left their slot to make room for another."
)
RECEIPT_AT = _gauge(
    "safegene_receipt_timestamp_seconds",
    "When all that a rank holds was last found as promised.",
    "rank",
)
APPLY_SECONDS = Histogram(
    "safegene_revision_apply_seconds",
    "From a change seen in the registry to the revision offered here.",
    buckets=_APPLY_S,
)
LOAD_SECONDS = Histogram(
    "safegene_revision_load_seconds",
    "An adapter into the engine, until the receipts of all ranks have passed.",
    buckets=_LOAD_S,
)
UNPROTECTED_MODE = _gauge(
    "safegene_unprotected_mode", "1 where this server may answer without safety so.", "mode"
)
BUILD_INFO = _gauge(
    "safegene_build_info",
    "1; what is running.",
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
    "safegene_replicas", "Replicas that the registry has seen lately, level or late.", "state"
)
JOBS = _gauge("safegene_jobs", "Jobs in the registry.", "kind", "state")
JOB_SECONDS = Histogram(
    "safegene_job_seconds", "Jobs that came to their end here.", ("kind",), buckets=_JOB_S
)


class ReplicaGauges(NamedTuple):
    """The gauges of a replica that have no label, and its counter."""

    registry_up: Gauge
    lag: Gauge
    ready: Gauge
    faults: Gauge
    losses: Counter


@cache
def replica_gauges() -> ReplicaGauges:
    """Made by a server with a registry alone: a gauge without labels begins at 0, which would say
    of any other server that its registry is down."""
    return ReplicaGauges(
        _gauge("safegene_registry_up", "1 if the registry answered when it was last asked."),
        _gauge(
            "safegene_registry_lag_seconds",
            "How long this replica has known of a version that it does not serve; 0 when level.",
        ),
        _gauge("safegene_replica_ready", "1 if all that is published is served here."),
        _gauge("safegene_replica_faults", "Why it is not ready: how many reasons."),
        Counter(
            "safegene_registry_losses_total",
            "Times that the registry was found without changes that had been seen of it.",
        ),
    )
