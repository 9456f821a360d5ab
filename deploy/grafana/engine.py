"""The dashboard of one replica: what its workers carry, and how busy vLLM is with it."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from deploy.grafana.panels import RATES, choice, frame, lines, number, row, rows

HERE = 'job=~"$job",instance=~"$instance"'


def build() -> dashboard.Dashboard:
    made = frame(
        "safegene-engine",
        "SafeGene / engine",
        "Replicas one by one: what their workers carry, and how busy vLLM is.",
        [
            choice("job", "Registry", "safegene_build_info"),
            choice("instance", "Replica", 'safegene_build_info{job=~"$job"}'),
        ],
    )
    made = row(
        made,
        "What the workers carry",
        rows(
            "Replicas",
            "Versions, way of application, family, and whether each is ready.",
            {
                "ready": "min by (instance, version, vllm_version, apply, family) ("
                f"safegene_build_info{{{HERE}}} * on (job, instance) group_left ()"
                f" max by (job, instance) (safegene_replica_ready{{{HERE}}}))"
            },
            height=5,
        ),
        lines(
            "Sites of the vector",
            "Where each rank applies it, and where it should.",
            {"{{instance}} rank {{rank}} {{state}}": f"safegene_sites{{{HERE}}}"},
            width=8,
        ),
        lines(
            "Age of receipts",
            "Since a rank was last found to apply what it promised.",
            {
                "{{instance}} rank {{rank}}": "time() -"
                f" safegene_receipt_timestamp_seconds{{{HERE}}}"
            },
            unit="s",
            width=8,
        ),
        lines(
            "Memory",
            "What the vector and the adapters take, per rank.",
            {
                "{{instance}} rank {{rank}} vector": f"safegene_vector_bytes{{{HERE}}}",
                "{{instance}} rank {{rank}} adapters": f"safegene_adapter_bytes{{{HERE}}}",
            },
            unit="bytes",
            width=8,
        ),
        lines(
            "Slots",
            "Adapters on the device, of those that fit.",
            {"{{instance}} {{state}}": f"max by (instance, state) (safegene_slots{{{HERE}}})"},
            width=8,
        ),
        lines(
            "Evictions per minute",
            "Adapters that had to make room for others: many are a sign of too few slots.",
            {
                "{{instance}}": "60 * sum by (instance)"
                f" (rate(safegene_slot_evictions_total{{{HERE}}}[5m]))"
            },
            width=8,
        ),
        lines(
            "Loading an adapter",
            "Into the engine, with receipts; 95 % of an hour's loads within this time.",
            {
                "{{instance}}": "histogram_quantile(0.95, sum by (instance, le)"
                f" (increase(safegene_revision_load_seconds_bucket{{{HERE}}}[1h])))"
            },
            unit="s",
            width=8,
        ),
    )

    made = row(
        made,
        "vLLM",
        lines(
            "Requests in the engine",
            "Running and waiting, by vLLM's own count.",
            {
                "{{instance}} running": f"sum by (instance) (vllm:num_requests_running{{{HERE}}})",
                "{{instance}} waiting": f"sum by (instance) (vllm:num_requests_waiting{{{HERE}}})",
            },
            width=8,
        ),
        lines(
            "KV cache used",
            "By vLLM's own count.",
            {"{{instance}}": f"max by (instance) (vllm:kv_cache_usage_perc{{{HERE}}})"},
            unit=RATES,
            top=1,
            width=8,
        ),
        lines(
            "Tokens per second",
            "Of the whole engine, probes and trials included.",
            {
                "{{instance}} read": "sum by (instance)"
                f" (rate(vllm:prompt_tokens_total{{{HERE}}}[5m]))",
                "{{instance}} written": "sum by (instance)"
                f" (rate(vllm:generation_tokens_total{{{HERE}}}[5m]))",
            },
            width=8,
        ),
        lines(
            "Time to first token",
            "Inside the engine, and as clients see it: 95 % within.",
            {
                "{{instance}} engine": "histogram_quantile(0.95, sum by (instance, le)"
                f" (rate(vllm:time_to_first_token_seconds_bucket{{{HERE}}}[5m])))",
                "{{instance}} client": "histogram_quantile(0.95, sum by (instance, le)"
                f" (rate(safegene_time_to_first_token_seconds_bucket{{{HERE}}}[5m])))",
            },
            unit="s",
            width=8,
        ),
        lines(
            "Requests by tenant",
            "Who this replica works for.",
            {"{{tenant}}": f"sum by (tenant) (rate(safegene_requests_total{{{HERE}}}[5m]))"},
            unit="reqps",
            stacked=True,
            width=8,
        ),
        lines(
            "Time spent on probes",
            "Share of the time since the start.",
            {"{{instance}}": f"max by (instance) (safegene_probe_engine_share{{{HERE}}})"},
            unit=RATES,
            width=8,
        ),
    )

    made = row(
        made,
        "Jobs and Prometheus itself",
        lines(
            "Jobs",
            "How long jobs take: 95 % of an hour's within.",
            {
                "{{kind}}": "histogram_quantile(0.95, sum by (kind, le)"
                f" (increase(safegene_job_seconds_bucket{{{HERE}}}[1h])))"
            },
            unit="s",
            width=8,
        ),
        lines(
            "A scrape takes",
            "Reading the metrics of a replica.",
            {"{{instance}}": f"scrape_duration_seconds{{{HERE}}}"},
            unit="s",
            width=8,
        ),
        number(
            "Series per replica",
            "The most that a replica shows: bounded by `metrics.max_tenants`.",
            f"max(scrape_samples_scraped{{{HERE}}})",
            width=8,
        ),
    )
    return made
