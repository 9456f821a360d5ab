"""Probes: a few questions asked now and then of what is served, so that drift is seen.

A smoke test with string rules, of the engine of this process alone. Decides nothing: what it finds
is counted, shown and exported, and whoever is alerted acts.
"""

from safegene_server.monitoring.probes.job import PROBE, handler, start
from safegene_server.monitoring.probes.prober import Prober, ProbeStatus
from safegene_server.monitoring.probes.result import Result
from safegene_server.monitoring.probes.settings import ProbeSettings

__all__ = ["PROBE", "ProbeSettings", "ProbeStatus", "Prober", "Result", "handler", "start"]
