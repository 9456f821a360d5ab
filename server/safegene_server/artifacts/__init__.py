"""Validated, immutable local copies of tenants' sources, for the engine to load."""

from safegene_server.artifacts.fetch import Limits, Watch
from safegene_server.artifacts.source import SourceRules
from safegene_server.artifacts.store import Staged, Store

__all__ = ["Limits", "SourceRules", "Staged", "Store", "Watch"]
