"""Probes: a few prompts sent periodically to what is served, to detect drift.

A smoke test with string rules, of this process's own engine. Results are counted, shown and
exported; alerts act on them.
"""

from safegene_server.monitoring.probes.job import PROBE, enqueue_probe, probe_handler
from safegene_server.monitoring.probes.prober import Prober, ProbeStatus
from safegene_server.monitoring.probes.result import Result
from safegene_server.monitoring.probes.settings import ProbeSettings

__all__ = [
    "PROBE",
    "ProbeSettings",
    "ProbeStatus",
    "Prober",
    "Result",
    "enqueue_probe",
    "probe_handler",
]
