"""The HTTP routes below /v1/safegene/: tenants, families, keys, jobs, rollouts, replicas, audit.

Between HTTP and tenant life: reads bodies, looks at who asks, answers in one shape. Decides nothing
about tenants, and lets nobody in: that is access's business, in front.
"""

from safegene_server.api.router import router

__all__ = ["router"]
