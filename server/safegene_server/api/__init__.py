"""HTTP routes below /v1/safegene/: tenants, families, keys, jobs, rollouts, replicas, audit.

They parse bodies, check what the request's key may see, and build responses; `access`, in front,
authenticates.
"""

from safegene_server.api.router import router

__all__ = ["router"]
