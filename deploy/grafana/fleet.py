"""The dashboard of everything: is safety on everywhere, since when, and does it work?"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from deploy.grafana.panels import RATES, RED_FROM_ONE, choice, frame, lines, number, row, rows

JOB = 'job=~"$job"'


def build() -> dashboard.Dashboard:
    made = frame(
        "safegene-fleet",
        "SafeGene / fleet",
        "Every tenant of every replica: is safety on, since when, and does it work?",
        [choice("job", "Registry", "safegene_build_info")],
    )
    made = row(
        made,
        "Is safety on?",
        number(
            "Tenants with safety",
            "Tenants whose gain is above 0 on every replica that serves them.",
            f"count(min by (job, tenant) (safegene_gain_norm{{{JOB}}}) > 0) or vector(0)",
            steps=((None, "red"), (1, "green")),
        ),
        number(
            "Tenants without",
            "Tenants whose gain is 0 on at least one replica.",
            f"count(min by (job, tenant) (safegene_gain_norm{{{JOB}}}) == 0) or vector(0)",
            steps=RED_FROM_ONE,
        ),
        number(
            "Answers without safety",
            "Requests answered without a profile, within the time shown.",
            f"sum(increase(safegene_unprotected_requests_total{{{JOB}}}[$__range])) or vector(0)",
            steps=RED_FROM_ONE,
        ),
        number(
            "Oldest receipt",
            "How long ago the slowest rank was last found to apply what it promised.",
            f"max(time() - safegene_receipt_timestamp_seconds{{{JOB}}})",
            unit="s",
            steps=((None, "green"), (120, "orange"), (300, "red")),
        ),
        number(
            "Replicas not ready",
            "Servers that run but do not serve all that is published.",
            f"count(safegene_replica_ready{{{JOB}}} == 0) or vector(0)",
            steps=RED_FROM_ONE,
        ),
        number(
            "Alerts",
            "SafeGene's alerts that fire now.",
            'count(ALERTS{alertname=~"Safegene.*",alertstate="firing"}) or vector(0)',
            steps=RED_FROM_ONE,
        ),
        rows(
            "Tenants",
            "What is published, since when, how strong, and how the last probes went.",
            {
                "served": "count by (job, tenant, revision, apply)"
                f" (safegene_revision_info{{{JOB}}})",
                "since": "1000 * max by (job, tenant)"
                f" (safegene_revision_published_timestamp_seconds{{{JOB}}})",
                "gain norm": f"min by (job, tenant) (safegene_gain_norm{{{JOB}}})",
                "mean coefficient": "min by (job, tenant)"
                f' (safegene_coefficient{{{JOB},stat="mean"}})',
                "attack success": "max by (job, tenant)"
                f" (safegene_probe_attack_success_ratio{{{JOB}}})",
                "over-refusal": "max by (job, tenant)"
                f" (safegene_probe_over_refusal_ratio{{{JOB}}})",
                "coherent": f"min by (job, tenant) (safegene_probe_coherent_ratio{{{JOB}}})",
                "requests": f"sum by (job, tenant) (safegene:requests:rate5m{{{JOB}}})",
            },
            units={
                "since": "dateTimeAsIso",
                "attack success": RATES,
                "over-refusal": RATES,
                "coherent": RATES,
                "requests": "reqps",
            },
        ),
        lines(
            "Gain norm",
            "How strongly each tenant's vector is applied; the weakest replica.",
            {"{{tenant}}": f"min by (tenant) (safegene_gain_norm{{{JOB}}})"},
        ),
        lines(
            "Mean coefficient",
            "Over the layers of the vector, with the line below which an alert fires.",
            {
                "{{tenant}}": f'min by (tenant) (safegene_coefficient{{{JOB},stat="mean"}})',
                "alert below": "safegene:threshold:coefficient",
            },
        ),
        lines(
            "Sites of the vector",
            "Where the vector is applied, and where it should be, of the worst rank.",
            {"{{state}}": f"min by (state) (safegene_sites{{{JOB}}})"},
        ),
        lines(
            "Age of receipts",
            "Since a rank was last found to apply what it promised.",
            {
                "{{instance}} rank {{rank}}": "max by (instance, rank)"
                f" (time() - safegene_receipt_timestamp_seconds{{{JOB}}})"
            },
            unit="s",
        ),
    )

    made = row(
        made,
        "Does it work? (probes)",
        lines(
            "Attack success",
            "Harmful probes that were answered. The alert takes the low end of the 95 % interval.",
            {
                "{{tenant}}": f"max by (tenant) (safegene_probe_attack_success_ratio{{{JOB}}})",
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
                "{{tenant}}": f"max by (tenant) (safegene_probe_over_refusal_ratio{{{JOB}}})",
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
                "{{tenant}}": f"min by (tenant) (safegene_probe_coherent_ratio{{{JOB}}})",
                "alert below": "safegene:threshold:coherent",
            },
            unit=RATES,
            top=1,
            width=8,
        ),
    )

    made = row(
        made,
        "Do changes arrive?",
        lines(
            "Registry version",
            "What each replica knows of and what it serves.",
            {
                "{{instance}} {{state}}": "max by (instance, state)"
                f" (safegene_registry_version{{{JOB}}})"
            },
            width=8,
        ),
        lines(
            "Lag",
            "How long a replica has known of a change that it does not serve.",
            {"{{instance}}": f"max by (instance) (safegene_registry_lag_seconds{{{JOB}}})"},
            unit="s",
            width=8,
        ),
        lines(
            "Replicas and faults",
            "Level with the registry or late, as it sees them; the registry and faults as they do.",
            {
                "{{state}}": f"max by (state) (safegene_replicas{{{JOB}}})",
                "registry up": f"min(safegene_registry_up{{{JOB}}})",
                "faults": f"sum(safegene_replica_faults{{{JOB}}})",
            },
            width=8,
        ),
        lines(
            "Revisions",
            "Revisions of the registry by state.",
            {"{{state}}": f"max by (state) (safegene_revisions{{{JOB}}})"},
            width=8,
        ),
        lines(
            "Jobs",
            "Jobs of the registry by kind and state.",
            {"{{kind}} {{state}}": f"max by (kind, state) (safegene_jobs{{{JOB}}})"},
            width=8,
        ),
        lines(
            "A change, from seen to served",
            "95 % of changes are served within this time.",
            {
                "seen to served": "histogram_quantile(0.95, sum by (le)"
                f" (increase(safegene_revision_apply_seconds_bucket{{{JOB}}}[1h])))",
                "load into the engine": "histogram_quantile(0.95, sum by (le)"
                f" (increase(safegene_revision_load_seconds_bucket{{{JOB}}}[1h])))",
            },
            unit="s",
            width=8,
        ),
    )

    made = row(
        made,
        "Who asks?",
        lines(
            "Requests",
            "By how they ended.",
            {"{{outcome}}": f"sum by (outcome) (safegene:requests:rate5m{{{JOB}}})"},
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Turned away",
            "By reason; limits are reasons too.",
            {"{{reason}}": f"sum by (reason) (safegene:rejected:rate5m{{{JOB}}})"},
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Time to first token",
            "95 % of a tenant's requests wait no longer.",
            {
                "{{tenant}}": f"max by (tenant) (safegene:ttft_seconds:p95_5m{{{JOB}}})",
                "alert above": "safegene:threshold:ttft_seconds",
            },
            unit="s",
            width=8,
        ),
        lines(
            "Between tokens",
            "95 % of the gaps in a tenant's streams are no longer.",
            {"{{tenant}}": f"max by (tenant) (safegene:itl_seconds:p95_5m{{{JOB}}})"},
            unit="s",
            width=8,
        ),
        lines(
            "Whole request",
            "95 % of a tenant's requests take no longer.",
            {"{{tenant}}": f"max by (tenant) (safegene:duration_seconds:p95_5m{{{JOB}}})"},
            unit="s",
            width=8,
        ),
        lines(
            "Refusals in answers",
            "Share of answers of the last hour that open with a refusal.",
            {"{{tenant}}": f"max by (tenant) (safegene:refusals:ratio1h{{{JOB}}})"},
            unit=RATES,
        ),
        lines(
            "Open modes and answers without safety",
            "Settings under which a server may answer without safety, and answers that had none.",
            {
                "{{mode}}": f"max by (mode) (safegene_unprotected_mode{{{JOB}}})",
                "requests per minute": "60 *"
                f" sum(rate(safegene_unprotected_requests_total{{{JOB}}}[5m]))",
            },
        ),
    )
    return made
