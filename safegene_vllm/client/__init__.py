"""A SafeGene server from Python: `Client` has a method for every route under /v1/safegene.

For administration: tenants, keys, rollouts, jobs. Not for chatting: that is the openai client's.
Loads httpx, nothing heavier.
"""

from safegene_vllm.client.client import Client
from safegene_vllm.errors import ApiError

__all__ = ["ApiError", "Client"]
