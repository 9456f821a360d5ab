"""Prometheus metrics and OpenTelemetry spans of traffic, applied vectors, registry and jobs.

All of it is on prometheus_client's default registry, so that it appears in vLLM's /metrics;
docs/reference/metrics.md lists every metric.
"""
