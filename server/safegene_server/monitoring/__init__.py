"""Metrics, traces and probes of one server process."""
