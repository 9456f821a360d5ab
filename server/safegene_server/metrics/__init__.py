"""What Prometheus and OpenTelemetry are told: traffic, what is applied, registry and jobs.

Everything is counted on prometheus_client's own registry, so that it appears in vLLM's /metrics.
Decides nothing and refuses nothing; docs/reference/metrics.md lists every metric.
"""
