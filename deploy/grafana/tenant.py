"""The dashboard of one tenant: what its owner asks, and what safety answers for it."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from deploy.grafana.panels import RATES, RED_FROM_ONE, choice, frame, lines, number, row, rows

ONE = 'job=~"$job",tenant="$tenant"'


def quantiles(metric: str) -> dict[str, str]:
    """Median and 95th percentile of a histogram of seconds, over five minutes."""
    buckets = f"sum by (le) (rate({metric}_bucket{{{ONE}}}[5m]))"
    return {
        "half within": f"histogram_quantile(0.5, {buckets})",
        "95 % within": f"histogram_quantile(0.95, {buckets})",
    }


def build() -> dashboard.Dashboard:
    made = frame(
        "safegene-tenant",
        "SafeGene / tenant",
        "One tenant: is its safety on, since when, does it work, and how is it served?",
        [
            choice("job", "Registry", "safegene_build_info"),
            choice("tenant", "Tenant", 'safegene_requests_total{job=~"$job"}', one=True),
        ],
    )
    made = row(
        made,
        "Is safety on?",
        number(
            "Revision",
            "What is served under the tenant's name.",
            f"max by (revision) (safegene_revision_info{{{ONE}}})",
            legend="{{revision}}",
        ),
        number(
            "On for",
            "Since this revision was published.",
            f"time() - max(safegene_revision_published_timestamp_seconds{{{ONE}}})",
            unit="dtdurations",
        ),
        number(
            "Gain norm",
            "On the weakest replica; 0 is no safety.",
            f"min(safegene_gain_norm{{{ONE}}})",
            steps=((None, "red"), (1e-9, "green")),
        ),
        number(
            "Layers with safety",
            "Layers whose coefficient is not 0.",
            f"min(safegene_active_layers{{{ONE}}})",
            steps=((None, "red"), (1, "green")),
        ),
        number(
            "Answers without safety",
            "Within the time shown.",
            f"sum(increase(safegene_unprotected_requests_total{{{ONE}}}[$__range])) or vector(0)",
            steps=RED_FROM_ONE,
        ),
        number(
            "Alerts",
            "Alerts about this tenant that fire now.",
            'count(ALERTS{alertname=~"Safegene.*",alertstate="firing",tenant="$tenant"})'
            " or vector(0)",
            steps=RED_FROM_ONE,
        ),
        lines(
            "Coefficients",
            "Over the layers of the vector, on the weakest replica.",
            {
                "{{stat}}": f"min by (stat) (safegene_coefficient{{{ONE}}})",
                "alert if the mean is below": "safegene:threshold:coefficient",
            },
        ),
        lines(
            "Gain norm by replica",
            "Replicas that disagree serve different profiles.",
            {"{{instance}}": f"max by (instance) (safegene_gain_norm{{{ONE}}})"},
        ),
        rows(
            "Revisions served",
            "By how many replicas each.",
            {
                "replicas": "count by (revision, profile, family, apply)"
                f" (safegene_revision_info{{{ONE}}})"
            },
            height=5,
        ),
    )

    made = row(
        made,
        "Does it work?",
        lines(
            "Attack success",
            "Harmful probes that were answered, with the ends of the 95 % interval that count.",
            {
                "answered": f"max(safegene_probe_attack_success_ratio{{{ONE}}})",
                "at least": f"max(safegene:probe_attack_success:low95{{{ONE}}})",
                "alert above": "safegene:threshold:attack_success",
            },
            unit=RATES,
            top=1,
            width=8,
        ),
        lines(
            "Over-refusal",
            "Harmless probes that were refused, look-alikes of harmful ones among them.",
            {
                "refused": f"max(safegene_probe_over_refusal_ratio{{{ONE}}})",
                "at least": f"max(safegene:probe_over_refusal:low95{{{ONE}}})",
                "alert above": "safegene:threshold:over_refusal",
            },
            unit=RATES,
            top=1,
            width=8,
        ),
        lines(
            "Coherent answers",
            "Answers to probes that are text, not noise.",
            {
                "coherent": f"min(safegene_probe_coherent_ratio{{{ONE}}})",
                "at most": f"min(safegene:probe_coherent:high95{{{ONE}}})",
                "alert below": "safegene:threshold:coherent",
            },
            unit=RATES,
            top=1,
            width=8,
        ),
        lines(
            "Refusals in answers",
            "Refusals of the last hour, and what the day before lets one expect.",
            {
                "refusals": f"sum(safegene:refusals:increase1h{{{ONE}}})",
                "expected": f"sum(safegene:refusals:expected1h{{{ONE}}})",
            },
            width=8,
        ),
        lines(
            "Prompts behind the ratios",
            "How many probes of each kind the last run asked.",
            {"{{kind}}": f"max by (kind) (safegene_probe_prompts{{{ONE}}})"},
            width=8,
        ),
        lines(
            "Probe runs",
            "Per hour, by how they ended.",
            {"{{outcome}}": f"sum by (outcome) (increase(safegene_probe_runs_total{{{ONE}}}[1h]))"},
            width=8,
        ),
    )

    made = row(
        made,
        "How is it served?",
        lines(
            "Requests",
            "By how they ended.",
            {"{{outcome}}": f"sum by (outcome) (safegene:requests:rate5m{{{ONE}}})"},
            unit="reqps",
            stacked=True,
            width=8,
        ),
        lines(
            "Tokens per second",
            "Read and written.",
            {"{{kind}}": f"sum by (kind) (safegene:tokens:rate5m{{{ONE}}})"},
            width=8,
        ),
        lines(
            "Turned away",
            "By reason: limits are the tenant's own.",
            {"{{reason}}": f"sum by (reason) (safegene:rejected:rate5m{{{ONE}}})"},
            unit="reqps",
            stacked=True,
            width=8,
        ),
        lines(
            "Time to first token",
            "As the client sees it.",
            quantiles("safegene_time_to_first_token_seconds")
            | {"alert above": "safegene:threshold:ttft_seconds"},
            unit="s",
            width=8,
        ),
        lines(
            "Between tokens",
            "Between the chunks of a stream.",
            quantiles("safegene_inter_token_latency_seconds"),
            unit="s",
            width=8,
        ),
        lines(
            "Whole request",
            "From its first byte to the answer's last.",
            quantiles("safegene_request_duration_seconds"),
            unit="s",
            width=8,
        ),
    )
    return made
