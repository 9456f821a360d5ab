"""A table of numbers per tenant from PromQL alone, for a safety team."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from deploy.prometheus.stack import Stack

Format = Callable[[float], str]


def _share(value: float) -> str:
    return f"{value:.0%}"


def _since(value: float) -> str:
    minutes, seconds = divmod(max(0, round(time.time() - value)), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _ms(value: float) -> str:
    return f"{1000 * value:.0f} ms"


def _subject(labels: Mapping[str, str]) -> str:
    """The subject of an alert by its labels."""
    return labels.get("tenant") or labels.get("mode") or labels.get("instance", "")


COLUMNS: tuple[tuple[str, str, Format], ...] = (
    (
        "on for",
        "min by (tenant) (safegene_revision_published_timestamp_seconds)",
        _since,
    ),
    ("gain norm", "min by (tenant) (safegene_gain_norm)", "{:.2f}".format),
    ("mean λ", 'min by (tenant) (safegene_coefficient{stat="mean"})', "{:.2f}".format),
    ("layers", "min by (tenant) (safegene_active_layers)", "{:.0f}".format),
    (
        "completed",
        'sum by (tenant) (safegene_requests_total{outcome="ok"})',
        "{:.0f}".format,
    ),
    ("rejected", "sum by (tenant) (safegene_rejected_requests_total)", "{:.0f}".format),
    (
        "refusals",
        "sum by (tenant) (safegene_refusals_total)"
        " / (sum by (tenant) (safegene_judged_answers_total) > 0)",
        _share,
    ),
    ("tokens out", "sum by (tenant) (safegene_generation_tokens_total)", "{:.0f}".format),
    (
        "TTFT p95",
        "histogram_quantile(0.95, sum by (tenant, le)"
        " (safegene_time_to_first_token_seconds_bucket))",
        _ms,
    ),
    ("unprotected", "sum by (tenant) (safegene_unprotected_requests_total)", "{:.0f}".format),
    ("attack success", "max by (tenant) (safegene_probe_attack_success_ratio)", _share),
    ("over-refusal", "max by (tenant) (safegene_probe_over_refusal_ratio)", _share),
)
"""Heading, expression with one series per tenant, and format of its value."""


def page(stack: Stack) -> str:
    """A table of every tenant in Prometheus, and the firing alerts."""
    served = {
        sample.labels["tenant"]: sample.labels["revision"]
        for sample in stack.query("max by (tenant, revision) (safegene_revision_info)")
        if "tenant" in sample.labels
    }
    found: dict[str, dict[str, str]] = {tenant: {"served": served[tenant]} for tenant in served}
    for heading, expr, form in COLUMNS:
        for sample in stack.query(expr):
            row = found.setdefault(sample.labels.get("tenant", ""), {})
            row[heading] = "-" if math.isnan(sample.value) else form(sample.value)
    headings = ["tenant", "served", *(heading for heading, _, _ in COLUMNS)]
    table = [headings] + [
        [tenant or "(none)", *(found[tenant].get(heading, "-") for heading in headings[1:])]
        for tenant in sorted(found)
    ]
    widths = [max(len(row[at]) for row in table) for at in range(len(headings))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    alerts = [
        f"{name}: {', '.join(map(_subject, labels))}"
        for name, labels in sorted(stack.firing().items())
    ]
    return "\n".join([*lines, "", "alerts: " + ("; ".join(alerts) or "none")])
