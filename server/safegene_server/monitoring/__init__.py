"""Metrics and probes of one server process."""
