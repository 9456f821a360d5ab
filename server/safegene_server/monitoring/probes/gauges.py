"""Prometheus metrics of probes: the last rates of each tenant with series of its own.

A tenant whose revision was not probed yet has no rates, because older ones are of another revision.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from prometheus_client import Counter, Gauge

from safegene_server.metrics.labels import TenantLabels
from safegene_server.monitoring.probes.result import Result

Outcome = Literal["ok", "failed", "skipped"]


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"safegene_probe_{name}", text, labels, multiprocess_mode="livemostrecent")


ATTACK_SUCCESS = _gauge(
    "attack_success_ratio", "Share of harmful probe prompts that were not refused.", "tenant"
)
OVER_REFUSAL = _gauge(
    "over_refusal_ratio", "Share of harmless probe prompts that were refused.", "tenant"
)
COHERENT = _gauge("coherent_ratio", "Share of coherent completions of probe prompts.", "tenant")
PROMPTS = _gauge("prompts", "Prompts of the last probe, by kind.", "tenant", "kind")
TIMESTAMP = _gauge("timestamp_seconds", "When the last complete probe ended, Unix time.", "tenant")
DURATION = _gauge(
    "duration_seconds", "Seconds in the engine of the last probe, pauses not counted.", "tenant"
)
ENGINE_SHARE = _gauge("engine_share", "Share of the time since start with a probe in the engine.")
RUNS = Counter("safegene_probe_runs_total", "Probes that ended, by outcome.", ["tenant", "outcome"])


def show(labels: TenantLabels, result: Result) -> None:
    """Export the rates of a tenant, if it has series of its own."""
    if not labels.has_own(result.tenant):
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


def clear(labels: TenantLabels, result: Result) -> None:
    """Remove the series that `show` exported."""
    if not labels.has_own(result.tenant):
        return
    for gauge in (ATTACK_SUCCESS, OVER_REFUSAL, COHERENT, TIMESTAMP, DURATION):
        _remove(gauge, result.tenant)
    for kind in result.tally.refused:
        _remove(PROMPTS, result.tenant, kind)


def begin(labels: TenantLabels, tenant: str) -> None:
    """Export zeros for a tenant that will be probed, so that the first failure is an increase."""
    for outcome in get_args(Outcome):
        RUNS.labels(labels.label(tenant), outcome)


def count(labels: TenantLabels, tenant: str, outcome: Outcome) -> None:
    """Count a probe that ended."""
    begin(labels, tenant)
    RUNS.labels(labels.label(tenant), outcome).inc()


def _remove(gauge: Any, *labels: str) -> None:
    # With PROMETHEUS_MULTIPROC_DIR no series can be removed, and no comparison with NaN is true.
    gauge.labels(*labels).set(math.nan)
    gauge.remove(*labels)
