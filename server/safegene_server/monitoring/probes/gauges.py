"""What Prometheus is told of probes: the last rates of each tenant with a series of its own.

On prometheus_client's own registry, so on vLLM's /metrics. A tenant whose revision was not probed
yet has no rates: old ones would speak of something that is not served any more.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, get_args

from prometheus_client import Counter, Gauge

from safegene_server.monitoring.probes.result import Result

Outcome = Literal["ok", "failed", "skipped"]


class Labels(Protocol):
    """Whose series are their own (safegene_server.metrics.labels.TenantLabels)."""

    def label(self, tenant: str) -> str: ...

    def own(self, tenant: str) -> bool: ...


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"safegene_probe_{name}", text, labels, multiprocess_mode="livemostrecent")


ATTACK_SUCCESS = _gauge(
    "attack_success_ratio", "Share of harmful probe questions that were not refused.", "tenant"
)
OVER_REFUSAL = _gauge(
    "over_refusal_ratio", "Share of harmless probe questions that were refused.", "tenant"
)
COHERENT = _gauge("coherent_ratio", "Share of coherent answers to probe questions.", "tenant")
PROMPTS = _gauge("prompts", "Questions of the last probe, by kind.", "tenant", "kind")
TIMESTAMP = _gauge("timestamp_seconds", "When the last whole probe ended, Unix time.", "tenant")
DURATION = _gauge(
    "duration_seconds", "Seconds in the engine of the last probe, pauses not counted.", "tenant"
)
ENGINE_SHARE = _gauge("engine_share", "Share of the time since start with a probe in the engine.")
RUNS = Counter(
    "safegene_probe_runs_total", "Probes that ended, by how they did.", ["tenant", "outcome"]
)


def show(labels: Labels, result: Result) -> None:
    """The rates of a tenant, if it has series of its own."""
    if not labels.own(result.tenant):
        return
    values = {
        ATTACK_SUCCESS: result.attack_success.share,
        OVER_REFUSAL: result.over_refusal.share,
        COHERENT: result.tally.coherent.share,
        TIMESTAMP: result.at.timestamp(),
        DURATION: result.seconds,
    }
    for gauge, value in values.items():
        gauge.labels(result.tenant).set(value)
    for kind, count in result.tally.refused.items():
        PROMPTS.labels(result.tenant, kind).set(count.n)


def clear(labels: Labels, result: Result) -> None:
    """Take back what `show` has told."""
    if not labels.own(result.tenant):
        return
    for gauge in (ATTACK_SUCCESS, OVER_REFUSAL, COHERENT, TIMESTAMP, DURATION):
        _remove(gauge, result.tenant)
    for kind in result.tally.refused:
        _remove(PROMPTS, result.tenant, kind)


def begin(labels: Labels, tenant: str) -> None:
    """Zeros for a tenant that will be probed, so that the first failure is a rise."""
    for outcome in get_args(Outcome):
        RUNS.labels(labels.label(tenant), outcome)


def count(labels: Labels, tenant: str, outcome: Outcome) -> None:
    begin(labels, tenant)
    RUNS.labels(labels.label(tenant), outcome).inc()


def _remove(gauge: Any, *labels: str) -> None:
    # Where several processes share files (PROMETHEUS_MULTIPROC_DIR) nothing can be removed, and no
    # comparison is true of NaN.
    gauge.labels(*labels).set(math.nan)
    gauge.remove(*labels)
