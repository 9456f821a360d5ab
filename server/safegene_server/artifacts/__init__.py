"""From what an owner named to a validated, immutable local copy that the engine may read.

Not a registry: which tenant a copy belongs to, and who may be served it, is known elsewhere.
"""

from safegene_server.artifacts.fetch import Limits, Watch
from safegene_server.artifacts.source import SourceRules
from safegene_server.artifacts.store import Staged, Store

__all__ = ["Limits", "SourceRules", "Staged", "Store", "Watch"]
